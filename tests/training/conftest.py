"""A small glyph set and options that train on it in about a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastret.data import load_glyphs
from fastret.data.glyphs import write_glyphs
from fastret.training import TrainOptions, run
from fastret.training.memory import Peak

CLASSES = 40  # to train on, and as many held out
FONTS = 4


@pytest.fixture(scope="session")
def glyph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first classes of both halves of the shipped set, as a file of its own."""
    path = tmp_path_factory.mktemp("glyphs") / "few.npz"
    shipped = load_glyphs()
    images = shipped.images.view(-1, FONTS, 32, 32)
    kept = [*range(CLASSES), *range(shipped.train_classes, shipped.train_classes + CLASSES)]
    code_points = [ord(shipped.class_names[c]) for c in kept]
    write_glyphs(path, images[kept].numpy(), code_points, train_classes=CLASSES, recipe="{}")
    return path


@pytest.fixture
def options(glyph_file: Path, tmp_path: Path) -> Callable[..., TrainOptions]:
    """Options of a short run in a folder of its own, some of them replaced."""

    def build(**changed: Any) -> TrainOptions:
        short = {"data": str(glyph_file), "output": str(tmp_path / "run"), "iterations": 4, "batch_classes": 16}
        return TrainOptions(**{**short, **changed})

    return build


@pytest.fixture
def no_memory_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a run the process that measures memory: seconds of importing torch."""
    monkeypatch.setattr(run, "measure_peak", lambda job: Peak(12_345))
