"""load_folder on directories made by the tests."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastret.data import load_folder

Image = pytest.importorskip("PIL.Image")


def make_images(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """counts[name] uniform 12 x 8 images a class; the red of class k's i-th image is 40 k + i."""
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 8), (40 * k + i, 10, 200)).save(root / name / f"{i}{suffix}")
    return root


def test_layout_and_pixels(tmp_path: Path) -> None:
    data = load_folder(make_images(tmp_path, {"ant": 2, "bee": 3, "cat": 2, "dog": 4}), size=6)
    assert data.images.shape == (11, 3, 6, 6)
    assert data.train_classes == 2
    assert sorted(data.class_names) == ["ant", "bee", "cat", "dog"]
    first_red = {"ant": 0, "bee": 40, "cat": 80, "dog": 120}
    for label, name in enumerate(data.class_names):
        images = data.images[data.labels == label]
        assert images[:, 0, 0, 0].tolist() == [first_red[name] + i for i in range(len(images))]
        assert torch.unique(images[:, 1]).tolist() == [10]
        assert torch.unique(images[:, 2]).tolist() == [200]


def test_classes_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    make_images(tmp_path, dict.fromkeys("abcdefgh", 2))
    names = [load_folder(tmp_path, size=2, seed=seed).class_names for seed in (0, 0, 1)]
    assert names[0] == names[1]
    assert names[0] != names[2]
    assert sorted(names[0]) == sorted(names[2])


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 2), (0.5, 4), (0.75, 6), (0.99, 6)])
def test_train_fraction_leaves_two_classes_to_each_part(tmp_path: Path, fraction: float, expected: int) -> None:
    make_images(tmp_path, dict.fromkeys("abcdefgh", 2))
    data = load_folder(tmp_path, size=2, train_fraction=fraction)
    assert data.train_classes == expected
    assert not set(data.train().class_names) & set(data.held_out().class_names)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".bmp", ".webp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    data = load_folder(make_images(tmp_path, dict.fromkeys("abcd", 2), suffix), size=4)
    assert data.images.shape == (8, 3, 4, 4)


def test_grayscale(tmp_path: Path) -> None:
    assert load_folder(make_images(tmp_path, dict.fromkeys("abcd", 2)), grayscale=True).images.shape == (8, 1, 32, 32)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    make_images(tmp_path, dict.fromkeys("abcd", 2))
    sideways = Image.new("L", (8, 8))
    sideways.paste(255, (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise, so the white left half becomes the top
    sideways.save(tmp_path / "a" / "0.png", exif=exif)
    data = load_folder(tmp_path, size=8, grayscale=True)
    image = data.images[data.labels == data.class_names.index("a")][0, 0]
    assert torch.unique(image[:4]).tolist() == [255]
    assert torch.unique(image[4:]).tolist() == [0]


def test_the_centre_is_kept_in_proportion(tmp_path: Path) -> None:
    make_images(tmp_path, dict.fromkeys("abcd", 2))
    wide = Image.new("L", (16, 4))
    wide.paste(255, (6, 0, 10, 4))
    wide.save(tmp_path / "a" / "0.png")
    data = load_folder(tmp_path, size=4, grayscale=True)
    image = data.images[data.labels == data.class_names.index("a")][0, 0]
    assert torch.equal(image, torch.full((4, 4), 255, dtype=torch.uint8))


def test_small_classes_are_skipped_with_a_warning(tmp_path: Path) -> None:
    make_images(tmp_path, {"a": 2, "b": 2, "c": 2, "d": 2, "lone": 1, "none": 0})
    with pytest.warns(UserWarning, match="skipped 2 classes with fewer than 2 images: lone, none") as caught:
        data = load_folder(tmp_path, size=2)
    assert caught[0].filename == __file__
    assert sorted(data.class_names) == ["a", "b", "c", "d"]


def test_other_files_and_hidden_folders_are_ignored(tmp_path: Path) -> None:
    make_images(tmp_path, {**dict.fromkeys("abcd", 2), ".thumbnails": 3})
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "a" / "notes.txt").write_text("about")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_folder(tmp_path, size=2).labels) == 8


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing is not a directory"):
        load_folder(tmp_path / "missing")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load_folder(tmp_path)


def test_too_few_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 4 classes of 2 images or more, got 3"):
        load_folder(make_images(tmp_path, dict.fromkeys("abc", 2)))


@pytest.mark.parametrize("keep", [0, 40])
def test_an_unreadable_file_is_named(tmp_path: Path, keep: int) -> None:
    broken = make_images(tmp_path, dict.fromkeys("abcd", 2)) / "c" / "1.png"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        load_folder(tmp_path)


@pytest.mark.parametrize("argument", [{"size": 0}, {"train_fraction": 0.0}, {"train_fraction": 1.0}])
def test_arguments_out_of_range(tmp_path: Path, argument: dict[str, float]) -> None:
    make_images(tmp_path, dict.fromkeys("abcd", 2))
    with pytest.raises(ValueError, match=next(iter(argument))):
        load_folder(tmp_path, **argument)  # type: ignore[arg-type]


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"fastret\[data\]"):
        load_folder(tmp_path)
