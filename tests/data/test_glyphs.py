"""The shipped glyph set, its hash check, and the file format that scripts/render_glyphs.py writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastret.data import ImageSet, glyphs, load_glyphs

CLASSES, FONTS, SIZE = 1000, 4, 32


@pytest.fixture(scope="module")
def shipped() -> ImageSet:
    return load_glyphs()


def gray_images(classes: int = 3, fonts: int = 2) -> np.ndarray:
    """(classes, fonts, 4, 6) of the 16 levels that the format keeps exactly."""
    levels = np.random.default_rng(0).integers(0, 16, (classes, fonts, 4, 6))
    return (17 * levels).astype(np.uint8)


def test_shipped_shapes(shipped: ImageSet) -> None:
    assert shipped.images.shape == (CLASSES * FONTS, 1, SIZE, SIZE)
    assert shipped.images.dtype == torch.uint8
    assert shipped.labels.tolist() == [c for c in range(CLASSES) for _ in range(FONTS)]
    assert shipped.train_classes == 500
    assert all(len(name) == 1 for name in shipped.class_names)


def test_training_and_held_out_characters_are_disjoint(shipped: ImageSet) -> None:
    train, held_out = shipped.train(), shipped.held_out()
    assert len(set(train.class_names)) == len(set(held_out.class_names)) == 500
    assert not set(train.class_names) & set(held_out.class_names)
    for part in (train, held_out):
        assert part.labels.tolist() == [c for c in range(500) for _ in range(FONTS)]
    assert torch.equal(torch.cat([train.images, held_out.images]), shipped.images)


def test_no_image_is_blank_and_no_font_repeats_one(shipped: ImageSet) -> None:
    by_font = shipped.images.view(CLASSES, FONTS, -1)
    assert int(by_font.amax(dim=2).min()) == 255
    # At least this share of ink: a stray dot would be as useless as a blank image.
    assert float(by_font.float().mean(dim=2).min()) / 255 > 0.01
    for font in range(FONTS):
        assert len(torch.unique(by_font[:, font], dim=0)) == CLASSES


def test_the_four_fonts_draw_different_images(shipped: ImageSet) -> None:
    by_class = shipped.images.view(CLASSES, FONTS, -1)
    for a in range(FONTS):
        for b in range(a):
            assert not (by_class[:, a] == by_class[:, b]).all(dim=1).any()


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_one_changed_byte_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    content = bytearray(glyphs.SHIPPED.read_bytes())
    content[position] ^= 1
    damaged = tmp_path / "glyphs_demo.npz"
    damaged.write_bytes(content)
    monkeypatch.setattr(glyphs, "SHIPPED", damaged)
    with pytest.raises(ValueError, match="damaged") as caught:
        load_glyphs()
    assert glyphs.SHIPPED_SHA256 in str(caught.value)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)


def test_documented_hash_is_the_checked_one() -> None:
    assert glyphs.SHIPPED_SHA256 in glyphs.SHIPPED.with_name("GLYPHS.md").read_text(encoding="utf-8")


def test_a_written_file_loads_as_it_was(tmp_path: Path) -> None:
    images = gray_images()
    path = tmp_path / "new" / "set.npz"
    digest = glyphs.write_glyphs(path, images, [0x4E00, 0x4E01, 0x20000], train_classes=2, recipe="{}")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_glyphs(path)
    assert np.array_equal(loaded.images.numpy(), images.reshape(6, 1, 4, 6))
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.class_names == ["一", "丁", "\U00020000"]
    assert loaded.held_out().class_names == ["\U00020000"]
    assert load_glyphs(str(path)).train_classes == 2


def test_gray_is_rounded_to_the_nearest_level(tmp_path: Path) -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    glyphs.write_glyphs(tmp_path / "set.npz", images, [0x4E00], train_classes=1, recipe="{}")
    loaded = load_glyphs(tmp_path / "set.npz").images.numpy().reshape(-1)
    assert np.abs(loaded.astype(int) - images.reshape(-1)).max() == 8
    assert loaded[0] == 0
    assert loaded[-1] == 255


def test_equal_sets_give_equal_bytes(tmp_path: Path) -> None:
    digests = {
        glyphs.write_glyphs(tmp_path / name, gray_images(), [1, 2, 3], train_classes=2, recipe="{}")
        for name in ("a.npz", "b.npz")
    }
    assert len(digests) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_glyphs(tmp_path / "none.npz")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "npy", "other arrays", "wrong shape"])
def test_foreign_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign.npz"
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "other arrays":
        np.savez(path, images=np.zeros(3))
    elif kind == "wrong shape":
        np.savez(path, pixels=np.zeros((3, 2), np.uint8), code_points=np.zeros(3, np.int32), train_classes=1)
    else:
        whole = glyphs.SHIPPED.read_bytes()
        path.write_bytes({"empty": b"", "text": b"not an archive", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(ValueError, match=r"foreign\.npz is no glyph set"):
        load_glyphs(path)
