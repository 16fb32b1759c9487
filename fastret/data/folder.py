"""Read a directory of images, one sub-folder a class as in torchvision's ImageFolder, into an `ImageSet`."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastret.data.image_set import ImageSet

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})

# Retrieval needs two classes to tell apart, both in training and among those held out.
_MIN_CLASSES_A_PART = 2


def load_folder(
    path: str | Path,
    *,
    size: int = 32,
    train_fraction: float = 0.5,
    grayscale: bool = False,
    seed: int = 0,
) -> ImageSet:
    """Load `path/<class>/<image>` into memory; needs Pillow (the extra fastret[data]).

    Images are turned upright by their EXIF tag, cropped to a centred square and resized; transparency is
    dropped. Classes with fewer than two images are skipped with a warning: a lone query has nothing to find.

    Args:
        path: a directory with one sub-folder a class, whose png, jpg, jpeg, bmp and webp files are its
            images; hidden sub-folders are ignored.
        size: height and width in pixels.
        train_fraction: the share of the classes for training; each part keeps at least two classes.
        grayscale: one channel instead of three.
        seed: shuffles the classes before they are split. Equal seeds give equal splits.

    Returns:
        images (n, 1 or 3, size, size) in blocks of one class; class names are the sub-folders' names.

    Raises:
        ImportError: Pillow is missing.
        ValueError: an argument out of range, no such directory, no images, fewer than four usable classes, or
            an unreadable image (named).
    """
    root = Path(path)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie strictly between 0 and 1, got {train_fraction}")
    if not root.is_dir():
        raise ValueError(f"path must be a directory with one sub-folder a class, {root} is not a directory")
    if find_spec("PIL") is None:
        raise ImportError("load_folder needs Pillow: pip install 'fastret[data]'")

    folders = _usable_classes(root)
    order = torch.randperm(len(folders), generator=torch.Generator().manual_seed(seed)).tolist()
    folders = [folders[i] for i in order]
    train_classes = round(train_fraction * len(folders))
    train_classes = min(max(train_classes, _MIN_CLASSES_A_PART), len(folders) - _MIN_CLASSES_A_PART)

    files = [(label, file) for label, (_, members) in enumerate(folders) for file in members]
    images = torch.empty(len(files), 1 if grayscale else 3, size, size, dtype=torch.uint8)
    # Imported here, so that importing fastret needs numpy and torch alone.
    from tqdm import tqdm

    # disable=None: a bar on a terminal, silence in a log.
    for row, (_, file) in enumerate(tqdm(files, desc=f"reading {root.name}", unit="image", disable=None)):
        images[row] = _read_image(file, size=size, grayscale=grayscale)
    labels = torch.tensor([label for label, _ in files])
    return ImageSet(images, labels, [name for name, _ in folders], train_classes)


def _usable_classes(root: Path) -> list[tuple[str, list[Path]]]:
    """(class name, image files) of every sub-folder with two images or more, by name."""
    found = [
        (folder.name, sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not any(files for _, files in found):
        raise ValueError(f"no images in the sub-folders of {root}; looked for {', '.join(sorted(SUFFIXES))}")
    usable = [(name, files) for name, files in found if len(files) >= 2]
    if len(usable) < len(found):
        skipped = [name for name, files in found if len(files) < 2]
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        # stacklevel 3: point at load_folder's caller.
        warnings.warn(f"skipped {len(skipped)} classes with fewer than 2 images: {shown}", stacklevel=3)
    if len(usable) < 2 * _MIN_CLASSES_A_PART:
        raise ValueError(
            f"{root} must hold at least {2 * _MIN_CLASSES_A_PART} classes of 2 images or more, got {len(usable)}"
        )
    return usable


def _read_image(file: Path, *, size: int, grayscale: bool) -> torch.Tensor:
    """One image as (channels, size, size) uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            upright: Image.Image = ImageOps.exif_transpose(opened).convert("L" if grayscale else "RGB")
    # Pillow's PNG reader reports some broken files as SyntaxError.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error
    pixels = np.array(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).reshape(size, size, -1).permute(2, 0, 1)
