"""The image sets that `fastret train` knows, by name, and those it finds on disk. A new one is one entry of SOURCES."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastret.data import ImageSet, load_folder, load_glyphs
from fastret.data.glyphs import rendered_file


def _rendered(name: str, glyph_set: str) -> ImageSet:
    """A set that scripts/render_glyphs.py renders: too large to ship."""
    path = rendered_file(glyph_set)
    if not path.is_file():
        raise ValueError(
            f"data: {name} is not at {path}; in a checkout of fastret, python scripts/render_glyphs.py {glyph_set} "
            "renders it (needs apt-get and dpkg, or --font-dir; pip install 'fastret[data]')"
        )
    return load_glyphs(path)


SOURCES: dict[str, Callable[[], ImageSet]] = {
    "glyphs": load_glyphs,
    "glyphs-s": partial(_rendered, "glyphs-s", "s"),
    "cjk": partial(_rendered, "cjk", "l"),
}


def open_data(name: str) -> ImageSet:
    """A named set, a directory with one folder of images a class, or an .npz of scripts/render_glyphs.py.

    Raises:
        ValueError: it is none of these, or has no classes to train on or none to hold out.
        ImportError: a directory needs Pillow.
    """
    if name in SOURCES:
        data = SOURCES[name]()
    elif Path(name).is_dir():
        data = load_folder(name)
    elif Path(name).is_file() and Path(name).suffix == ".npz":
        data = load_glyphs(name)
    else:
        raise ValueError(
            f"data: expected {', '.join(SOURCES)}, a directory with one folder of images a class, "
            f"or an .npz of scripts/render_glyphs.py, got {name!r}"
        )
    held_out = len(data.class_names) - data.train_classes
    if data.train_classes < 2 or held_out < 2:
        raise ValueError(
            f"data: expected 2 classes or more both to train on and held out, got {data.train_classes} and {held_out}"
        )
    return data
