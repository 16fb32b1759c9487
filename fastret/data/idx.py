"""Image sets in the IDX format of MNIST: plain or gzip files of unsigned bytes.

A file is: two zero bytes, the type (0x08: unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit integer, then the values in row-major order (LeCun, Cortes, Burges: The MNIST database of handwritten digits).

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT licence): 60,000 training and 10,000 test images of
28 x 28 pixels in 10 classes. Debian packages it as dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from fastret.data.image_set import ImageSet

FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
DEBIAN_DATASETS = "/usr/share/datasets"

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> torch.Tensor:
    """The values of one file, as a uint8 tensor of the shape it names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut short, too long, or no IDX file of unsigned bytes.
    """
    file = Path(path)
    content = file.read_bytes()
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or content[3] == 0:
        raise ValueError(f"{file} is no IDX file of unsigned bytes: it begins with {content[:4].hex() or 'nothing'}")
    header = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist()) if len(content) >= header else None
    expected = None if shape is None else header + math.prod(shape)
    if shape is None or len(content) != expected:
        promised = f"a header of {header}" if shape is None else f"{expected:,} bytes by its header, {shape}"
        raise ValueError(f"{file} is damaged: expected {promised}, got {len(content):,} bytes")
    # bytearray: a tensor over memory that may be written to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def load_idx(images: str | Path, labels: str | Path, class_names: list[str]) -> ImageSet:
    """Gray images and their classes from a pair of files.

    Args:
        images: of shape (n, h, w).
        labels: of shape (n,), each an index into ``class_names``.
        class_names: one name a class; all are for training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_idx` raises it, or the two files do not belong together.
    """
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{images} and {labels}: expected images (n, h, w) and labels (n,), "
            f"got {tuple(pixels.shape)} and {tuple(classes.shape)}"
        )
    return ImageSet(pixels[:, None], classes.long(), class_names, len(class_names))


def fashion_folder() -> Path:
    """Where `load_fashion_mnist` looks: fashion-mnist in $FASTRET_DATA, by default in Debian's folder of data sets."""
    return Path(os.environ.get("FASTRET_DATA") or DEBIAN_DATASETS) / "fashion-mnist"


def load_fashion_mnist(folder: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """The 60,000 training and the 10,000 test images; both parts have all ten classes.

    Args:
        folder: of the four files, named as Debian and the authors name them; None: `fashion_folder`.

    Raises:
        FileNotFoundError: naming the folder and the Debian package.
        ValueError: as `load_idx` raises it.
    """
    root = fashion_folder() if folder is None else Path(folder)
    files = [root / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {root} (no {missing[0]}); install Debian's package, "
            "apt-get update && apt-get install dataset-fashion-mnist, "
            "or set FASTRET_DATA to a folder that has the files in fashion-mnist/"
        )
    names = list(FASHION_CLASSES)
    return load_idx(files[0], files[1], names), load_idx(files[2], files[3], names)
