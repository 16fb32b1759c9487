"""The image sets that `fastret train` knows, by name, and those it finds on disk. A new one is one entry of SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastret.data import ImageSet, load_fashion_mnist, load_folder, load_glyphs
from fastret.data.glyphs import rendered_file
from fastret.training.augment import GLYPHS, PHOTOS, Views


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """What a run trains on and what it is judged by.

    Attributes:
        train: images and classes to train on.
        queries: images to search for; none was trained on.
        gallery: images to search among; None: the queries, each left out of its own result.
        views: the random changes that leave such an image what it is.
    """

    train: ImageSet
    queries: ImageSet
    gallery: ImageSet | None
    views: Views


def _by_class(data: ImageSet, views: Views) -> RetrievalData:
    """Held-out classes, searched among themselves.

    Raises:
        ValueError: too few classes to train on or to hold out.
    """
    held_out = len(data.class_names) - data.train_classes
    if data.train_classes < 2 or held_out < 2:
        raise ValueError(
            f"data: expected 2 classes or more both to train on and held out, got {data.train_classes} and {held_out}"
        )
    return RetrievalData(data.train(), data.held_out(), None, views)


def _glyphs(path: Path | None = None) -> RetrievalData:
    return _by_class(load_glyphs(path), GLYPHS)


def _rendered(name: str, glyph_set: str) -> RetrievalData:
    """A set that scripts/render_glyphs.py renders: too large to ship."""
    path = rendered_file(glyph_set)
    if not path.is_file():
        raise ValueError(
            f"data: {name} is not at {path}; in a checkout of fastret, python scripts/render_glyphs.py {glyph_set} "
            "renders it (needs apt-get and dpkg, or --font-dir; pip install 'fastret[data]')"
        )
    return _glyphs(path)


def _fashion() -> RetrievalData:
    """The training images are trained on and searched, the test images are the queries."""
    try:
        train, test = load_fashion_mnist()
    except FileNotFoundError as error:
        raise ValueError(f"data: {error}") from error
    return RetrievalData(train, test, train, PHOTOS)


SOURCES: dict[str, Callable[[], RetrievalData]] = {
    "glyphs": _glyphs,
    "glyphs-s": partial(_rendered, "glyphs-s", "s"),
    "cjk": partial(_rendered, "cjk", "l"),
    "fashion": _fashion,
}


def open_data(name: str) -> RetrievalData:
    """A named set, a directory with one folder of images a class, or an .npz of scripts/render_glyphs.py.

    Raises:
        ValueError: it is none of these, or has no classes to train on or none to hold out.
        ImportError: a directory needs Pillow.
    """
    if name in SOURCES:
        return SOURCES[name]()
    if Path(name).is_dir():
        return _by_class(load_folder(name), PHOTOS)
    if Path(name).is_file() and Path(name).suffix == ".npz":
        return _glyphs(Path(name))
    raise ValueError(
        f"data: expected {', '.join(SOURCES)}, a directory with one folder of images a class, "
        f"or an .npz of scripts/render_glyphs.py, got {name!r}"
    )
