"""``fastret eval``: what it prints and writes, files of any kind, and errors in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastret
from fastret import cli
from fastret.retrieval import (
    map_at_r,
    mean_average_precision,
    nmi,
    r_precision,
    recall_at_k,
)
from fastret.retrieval.evaluate import evaluate, load_labels, load_rows


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Queries x, labels c (one of a class of its own), gallery y, d."""
    generator = np.random.default_rng(0)
    for rows, labels, n in (("x", "c", 60), ("y", "d", 40)):
        np.save(tmp_path / f"{rows}.npy", generator.normal(size=(n, 5)).astype(np.float32))
        np.save(tmp_path / f"{labels}.npy", np.r_[generator.integers(0, 7, n - 1), 100 + n])
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    """The exit code; arguments that are files of the folder become their paths."""
    given = [str(folder / a) if (folder / a).exists() or a.endswith((".npy", ".json")) else a for a in arguments]
    try:
        return cli.main(["eval", *given])
    except SystemExit as stopped:  # of the parser
        return int(stopped.code or 0)


@pytest.mark.parametrize("own", [True, False], ids=["leave-one-out", "gallery"])
def test_every_metric(files: Path, own: bool, capsys: pytest.CaptureFixture[str]) -> None:
    x, c, y, d = (torch.from_numpy(np.load(files / f"{name}.npy")) for name in "xcyd")
    gallery = () if own else ("--gallery", "y.npy", "--gallery-labels", "d.npy")
    names = ("recall", "r-precision", "map-at-r", "map", "nmi")
    assert run(files, "x.npy", "c.npy", *gallery, "--metrics", *names, "--ks", "1", "3", "--output", "found.json") == 0
    given = {} if own else {"gallery": y, "gallery_labels": d}
    expected = {f"recall@{k}": value for k, value in recall_at_k(x, c, ks=(1, 3), **given).items()}
    expected["r-precision"] = r_precision(x, c, **given)
    expected["map-at-r"] = map_at_r(x, c, **given)
    expected["map"] = mean_average_precision(x, c, **given)
    expected["nmi"] = nmi(x, c)
    found = json.loads((files / "found.json").read_text())
    assert found["metrics"] == {name: pytest.approx(value, abs=1e-7) for name, value in expected.items()}
    assert found["seconds"] > 0
    counts = {name: found[name] for name in ("queries", "gallery", "classes", "queries_without_match", "version")}
    assert counts == {
        "queries": 60,
        "gallery": 60 if own else 40,
        "classes": 8 if own else 9,
        "queries_without_match": 1,
        "version": fastret.__version__,
    }
    out = capsys.readouterr().out
    assert f"R@1          {found['metrics']['recall@1']:7.2%}\n" in out
    assert "60 queries" in out
    assert "1 queries without a match are excluded" in out
    for title in ("R@3", "R-precision", "MAP@R", "mAP", "NMI"):
        assert f"\n{title} " in out


def test_defaults_ask_for_what_the_gallery_has(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "x.npy", "c.npy", "--threads", str(torch.get_num_threads())) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["R@1", "R@10", "R-precision", "MAP@R"]
    assert sorted(path.name for path in files.iterdir()) == ["c.npy", "d.npy", "x.npy", "y.npy"]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float64),
        lambda x: x.astype(">f4"),
        np.asfortranarray,
        lambda x: x.astype(np.float16),
    ],
    ids=["float64", "big-endian", "columns first", "float16"],
)
def test_files_of_any_layout(files: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    x = change(np.load(files / "x.npy"))
    np.save(files / "other.npy", x)
    rows = load_rows(files / "other.npy", "embeddings")
    assert rows.is_contiguous()
    np.testing.assert_array_equal(rows.numpy(), x)
    labels = load_labels(files / "c.npy", "labels")
    whole = torch.from_numpy(np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("=")))
    assert evaluate(rows, labels).metrics == evaluate(whole, labels).metrics


def test_rows_are_mapped(tmp_path: Path) -> None:
    """A file of 64 GiB that takes no room on disk."""
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (1 << 25, 1 << 10))
    array[5, 3] = 2
    del array
    rows = load_rows(tmp_path / "x.npy", "embeddings")
    assert rows.shape == (1 << 25, 1 << 10)
    assert rows[5, 3] == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64, ">i4"])
def test_labels_of_any_integers(files: Path, dtype: str) -> None:
    labels = np.load(files / "c.npy").astype(dtype)
    np.save(files / "other.npy", labels)
    np.testing.assert_array_equal(load_labels(files / "other.npy", "labels").numpy(), labels)


def _write(folder: Path) -> None:
    x, c = np.load(folder / "x.npy"), np.load(folder / "c.npy")
    bad = x.copy()
    bad[3, 1] = np.nan
    others = {
        "nan": bad,
        "vector": x[:, 0],
        "cube": x[None],
        "no-rows": x[:0],
        "integers": x.astype(np.int64),
        "complex": x.astype(np.complex64),
        "long": x.astype(np.longdouble),
        "narrow": x[:, :4],
        "short": c[:50],
        "floats": c.astype(np.float32),
        "flags": c > 3,
        "column": c[:, None],
        "words": c.astype(str),
        "different": np.arange(60),
    }
    for name, array in others.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.savez(folder / "several.npz", x=x)
    whole = (folder / "x.npy").read_bytes()
    (folder / "cut.npy").write_bytes(whole[:-40])
    (folder / "header.npy").write_bytes(whole[:50])
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text.npy").write_text("these are no numbers\n")
    (folder / "damaged.npy").write_bytes(whole[:10] + b"{{{" + whole[13:])


GALLERY = ("--gallery", "y.npy", "--gallery-labels", "d.npy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.npy", "c.npy"), "nowhere.npy"),
        (("x.npy", "nowhere.npy"), "nowhere.npy"),
        (("cut.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("header.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("empty.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("text.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("damaged.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("several.npz", "c.npy"), "got an archive of several"),
        (("objects.npy", "c.npy"), "embeddings: expected an .npy file in"),
        (("x.npy", "objects.npy"), "labels: expected an .npy file in"),
        (("vector.npy", "c.npy"), "embeddings: expected shape (rows, width) in"),
        (("cube.npy", "c.npy"), "got (1, 60, 5)"),
        (("no-rows.npy", "c.npy"), "embeddings: expected"),
        (("integers.npy", "c.npy"), "embeddings: expected float16, float32 or float64 in"),
        (("complex.npy", "c.npy"), "got complex64"),
        (("long.npy", "c.npy"), "got float128"),
        (("nan.npy", "c.npy"), "embeddings: expected finite values"),
        (("x.npy", "short.npy"), "labels: expected shape (60,)"),
        (("x.npy", "floats.npy"), "labels: expected integers in"),
        (("x.npy", "flags.npy"), "got bool"),
        (("x.npy", "words.npy"), "labels: expected integers in"),
        (("x.npy", "column.npy"), "labels: expected shape (rows,) in"),
        (("x.npy", "different.npy"), "expected at least one query with a match"),
        (("x.npy", "c.npy", "--gallery", "y.npy"), "gallery, gallery_labels: expected both or neither"),
        (("x.npy", "c.npy", "--gallery-labels", "d.npy"), "gallery, gallery_labels: expected both or neither"),
        (("x.npy", "c.npy", "--gallery", "narrow.npy", "--gallery-labels", "c.npy"), "gallery: expected 5 columns"),
        (("x.npy", "c.npy", "--gallery", "nan.npy", "--gallery-labels", "c.npy"), "gallery: expected finite"),
        (("x.npy", "c.npy", "--gallery", "y.npy", "--gallery-labels", "c.npy"), "gallery_labels: expected shape (40,)"),
        (("x.npy", "c.npy", "--ks", "60"), "ks: expected numbers between 1 and the 59 rows to search, got 60"),
        (("x.npy", "c.npy", *GALLERY, "--ks", "41"), "the 40 rows to search, got 41"),
        (("x.npy", "c.npy", "--ks", "0"), "ks: expected numbers between 1"),
        (("x.npy", "c.npy", "--ks", "few"), "argument --ks: invalid int value: 'few'"),
        (("x.npy", "c.npy", "--metrics", "precision"), "argument --metrics: invalid choice: 'precision'"),
        (("x.npy", "c.npy", "--threads", "0"), "threads: expected at least 1, got 0"),
        (("x.npy", "c.npy", "--output", "nowhere/found.json"), "output: expected a file in a directory that exists"),
        (("x.npy",), "the following arguments are required: labels"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, tuple) else "",
)
def test_errors_are_one_line(
    files: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(files)
    assert run(files, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fastret: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
