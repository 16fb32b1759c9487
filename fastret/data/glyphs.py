"""Glyph retrieval: the same Chinese character drawn by different fonts (class = code point, image = font).

A real, non-trivial retrieval set small enough to ship: GLYPHS.md beside this file says from which fonts the
shipped one was rendered and under which licences. scripts/render_glyphs.py renders it and larger ones.

File format (.npz): `pixels` (classes, fonts, h, w // 2) uint8, two 4-bit gray levels a byte, the left pixel
in the high half; `code_points` (classes,) int32; `train_classes` () int64; `recipe` () str, JSON provenance.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from fastret.data.image_set import ImageSet

SHIPPED = Path(__file__).with_name("glyphs_demo.npz")
SHIPPED_SHA256 = "eb38b2cf403a5add71bd46eca58ddef4c336e5e6f083ec7d3eaff5b56525ee6b"

# 15 levels x 17 = 255: four bits reach both black and white exactly.
_GRAY_STEP = 17


def load_glyphs(path: str | Path | None = None) -> ImageSet:
    """Load a glyph set: the one that ships with fastret, or a file that scripts/render_glyphs.py wrote.

    Args:
        path: an .npz in the format above; None loads the shipped set after checking its SHA-256.

    Returns:
        images (classes * fonts, 1, h, w), white on black, in blocks of one class; labels (classes * fonts,);
        class names are the characters. The shipped set has 1,000 classes (500 for training) of 4 images of
        32 x 32 pixels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the shipped file is not the one that was published, or `path` holds no glyph set.
    """
    source = SHIPPED if path is None else Path(path)
    content = source.read_bytes()
    if path is None:
        found = hashlib.sha256(content).hexdigest()
        if found != SHIPPED_SHA256:
            raise ValueError(
                f"{source} is damaged: its SHA-256 is {found}, expected {SHIPPED_SHA256}; reinstall fastret"
            )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            packed, code_points = file["pixels"], file["code_points"]
            train_classes = int(file["train_classes"])
        classes, fonts, height, half_width = packed.shape
    # A truncated or foreign file fails in numpy (ValueError, EOFError), in zipfile or by a missing array
    # (KeyError); a plain .npy is no context manager (AttributeError before Python 3.11, TypeError since).
    except (ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is no glyph set of scripts/render_glyphs.py: {error}") from error
    levels = np.stack([packed >> 4, packed & 15], axis=-1)
    images = (levels * np.uint8(_GRAY_STEP)).reshape(classes * fonts, 1, height, 2 * half_width)
    return ImageSet(
        torch.from_numpy(images),
        torch.arange(classes).repeat_interleave(fonts),
        [chr(code_point) for code_point in code_points],
        train_classes,
    )


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastret, by default ~/.cache/fastret."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastret"


def rendered_file(name: str, cache: Path | None = None) -> Path:
    """Where scripts/render_glyphs.py puts the set of that name: in ``cache``, by default the cache folder."""
    return (cache or cache_folder()) / f"glyphs_{name}.npz"


def write_glyphs(path: Path, images: np.ndarray, code_points: list[int], *, train_classes: int, recipe: str) -> str:
    """Write the format above and return the file's SHA-256; equal arguments give equal bytes.

    Args:
        path: where to write; missing folders are made.
        images: (classes, fonts, h, w) uint8 with even w; gray is rounded to 16 levels.
        code_points: one a class, in the order of `images`.
        train_classes: the first so many classes are for training.
        recipe: JSON text saying from what the images were rendered.
    """
    levels = np.rint(images / _GRAY_STEP).astype(np.uint8)
    packed = levels[..., 0::2] << 4 | levels[..., 1::2]
    path.parent.mkdir(parents=True, exist_ok=True)
    # savez stamps every member with 1980-01-01, so the bytes do not depend on when they are written.
    np.savez_compressed(
        path,
        pixels=packed,
        code_points=np.asarray(code_points, dtype=np.int32),
        train_classes=np.int64(train_classes),
        recipe=np.array(recipe),
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()
