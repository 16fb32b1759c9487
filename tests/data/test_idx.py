"""The IDX format: what is read, and that damaged and foreign files are named."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

from fastret.data import load_fashion_mnist, load_idx, read_idx
from fastret.data.idx import FASHION_CLASSES, fashion_folder


def _idx(values: torch.Tensor, kind: int = 8) -> bytes:
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, kind, values.ndim]) + shape + bytes(values.flatten().tolist())


def _random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (300, 2), (0, 28, 28)])
def test_values_and_shape(pack: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = _random(*shape)
    (tmp_path / "file").write_bytes(pack(_idx(values)))
    found = read_idx(tmp_path / "file")
    assert found.dtype == torch.uint8
    assert torch.equal(found, values)
    found += 1  # its memory is its own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file of unsigned bytes: it begins with nothing"),
        (b"\x89PNG....", "is no IDX file of unsigned bytes: it begins with 89504e47"),
        (_idx(_random(2), kind=0x0D), "is no IDX file of unsigned bytes: it begins with 00000d01"),
        (b"\0\0\x08\0", "is no IDX file"),
        (b"\0\0\x08\x03\0\0", "is damaged: expected a header of 16, got 6 bytes"),
        (_idx(_random(3, 4))[:-1], r"is damaged: expected 24 bytes by its header, \(3, 4\), got 23 bytes"),
        (_idx(_random(3, 4)) + b"x", "got 25 bytes"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"expected [\d,]+ bytes by its header"),
        (gzip.compress(_idx(_random(3, 4)), mtime=0)[:-9], "is damaged: Compressed file ended"),
        (gzip.compress(_idx(_random(3, 4)), mtime=0)[:-8] + b"\0" * 8, "is damaged: CRC check failed"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff\xff\xff", "is damaged: "),
    ],
)
def test_damaged_and_foreign_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "some-file").write_bytes(content)
    with pytest.raises(ValueError, match=f"some-file {message}" if message.startswith("is ") else message):
        read_idx(tmp_path / "some-file")


def test_images_and_labels_belong_together(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes(_idx(_random(4, 2, 3)))
    labels.write_bytes(_idx(torch.tensor([1, 0, 1, 1], dtype=torch.uint8)))
    found = load_idx(images, labels, ["a", "b"])
    assert torch.equal(found.images, _random(4, 2, 3)[:, None])
    assert found.labels.tolist() == [1, 0, 1, 1]
    assert (found.class_names, found.train_classes) == (["a", "b"], 2)
    with pytest.raises(ValueError, match="labels must lie in"):
        load_idx(images, labels, ["a"])
    labels.write_bytes(_idx(torch.zeros(5, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"images \(n, h, w\) and labels \(n,\), got \(4, 2, 3\) and \(5,\)"):
        load_idx(images, labels, ["a"])


def test_fashion_mnist_is_read_from_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRET_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no train-images-idx3-ubyte.gz.*apt-get install dataset-fashion-mnist"
    ):
        load_fashion_mnist()
    assert fashion_folder() == tmp_path / "fashion-mnist"
    fashion_folder().mkdir()
    for part, count in (("train", 20), ("t10k", 10)):
        for kind, values in (("images-idx3", _random(count, 28, 28)), ("labels-idx1", torch.arange(count) % 10)):
            (fashion_folder() / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(_idx(values)))
    train, test = load_fashion_mnist()
    assert (len(train.images), len(test.images)) == (20, 10)
    assert train.class_names == test.class_names == list(FASHION_CLASSES)


def test_fashion_mnist_is_looked_for_where_debian_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRET_DATA", raising=False)
    assert fashion_folder() == Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_mnist_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRET_DATA", raising=False)
    train, test = load_fashion_mnist()
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
