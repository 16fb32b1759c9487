"""What a run found: metrics.json for programs, a table for people."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastret._version import __version__
from fastret.data import ImageSet
from fastret.training.evaluation import Scores
from fastret.training.losses import training_loss
from fastret.training.memory import Peak
from fastret.training.options import TrainOptions
from fastret.training.trainer import Point

NAME = "metrics.json"


@dataclass(frozen=True)
class Part:
    """Size of one side of the data."""

    classes: int
    images: int

    @staticmethod
    def of(data: ImageSet) -> "Part":
        return Part(len(data.class_names), len(data.images))

    def __str__(self) -> str:
        return f"{self.classes:,} classes, {self.images:,} images"


@dataclass(frozen=True)
class Seconds:
    """Time spent in training steps, of that in the loss's forward and backward; before them in initialising it; between
    them in tests."""

    training: float
    loss: float
    initialising: float
    testing: float


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one forward and backward of the loss, measured, and what the code it replaces needs at its peak."""

    loss: Peak
    official_bytes: int

    def describe(self, official: str, sizes: str) -> str:
        """Both for people, ``official`` being what the replaced code stores for a batch of ``sizes``."""
        needs = f"{official} need {_size(self.official_bytes)} at {sizes}"
        peak = self.loss
        return f"{f'not measured: {peak.problem}' if peak.bytes is None else _size(peak.bytes)}; {needs}"


@dataclass(frozen=True)
class Report:
    """Result of a run; metrics.json holds it field by field, and the versions it was made with."""

    options: TrainOptions
    train: Part
    held_out: Part
    gallery: Part | None
    batch_classes: int
    yardsticks: dict[str, float]
    before: Scores
    after: Scores
    history: list[float]
    curve: list[Point]
    width: int
    seconds: Seconds
    memory: Memory

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "versions": versions()}

    def write(self, folder: Path) -> None:
        """Write ``folder``/metrics.json, replacing an older one at once."""
        write_metrics(folder, self.as_dict())

    def table(self) -> str:
        """The summary printed at the end of a run."""
        options, rows = self.options, self.batch_classes * self.options.samples_per_class
        share = self.seconds.loss / self.seconds.training
        times = f"{self.seconds.training:.1f} s, the loss {self.seconds.loss:.1f} s ({share:.1%})"
        if self.seconds.initialising:
            times += f"; initialising it {self.seconds.initialising:.1f} s"
        if self.seconds.testing:
            times += f"; tests {self.seconds.testing:.1f} s ({self.seconds.testing / self.seconds.training:.1%})"
        loss = training_loss(options.loss)
        sizes = loss.official_at.format(
            rows=rows, images=self.batch_classes, classes=self.train.classes, width=self.width, noise=options.num_noise
        )
        before, after = self.before.named(), self.after.named()
        wide = max(10, *(len(name) + 1 for name in (*after, *self.yardsticks)))
        samples = options.samples_per_class
        drawn = f"classes x {samples}" if loss.labelled else f"x {samples} view{'s' if samples > 1 else ''}"
        searched = "" if self.gallery is None else f"; searched among {self.gallery}"
        return "\n".join(
            [
                f"Held out: {self.held_out}, never trained on{searched}",
                f"{'':{wide}}{'untrained':>12}{'trained':>12}",
                *(f"{name:{wide}}{percent(before[name]):>12}{percent(after[name]):>12}" for name in after),
                *(f"{name:{wide}}{percent(share):>12}" for name, share in self.yardsticks.items()),
                "",
                f"{options.loss}, {options.iterations:,} batches of {rows:,} images "
                f"({self.batch_classes:,} {drawn}), {options.device}",
                f"  training     {times}",
                f"  loss memory  {self.memory.describe(loss.official, sizes)}",
            ]
        )


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``folder``/metrics.json, replacing an older one at once."""
    unfinished = folder / f"{NAME}.tmp"
    unfinished.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / NAME)


def percent(share: float) -> str:
    return f"{share:.1%}"


def versions() -> dict[str, str | int]:
    """What may change a run's numbers."""
    return {
        "fastret": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _size(size: int) -> str:
    for factor, unit in ((10**9, "GB"), (10**6, "MB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1000:.3g} kB"
