"""What a training run depends on, with the quickstart's recipe as defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastret.ops.checks import check_positive
from fastret.training.losses import training_loss


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run; equal ones give equal weights on the same machine with the same number of threads.

    Attributes:
        data: "glyphs", a directory with one folder of images a class, or an .npz of scripts/render_glyphs.py.
        loss: a name in `fastret.training.losses.LOSSES`.
        output: folder of checkpoint.pt, metrics.json and plot.png.
        iterations: number of batches.
        batch_classes: classes of a batch; all there are where the data has fewer.
        samples_per_class: images of each class in a batch.
        temperature: of the loss, in units of the cosine; multi-similarity has none.
        lr: AdamW's learning rate at the start; it falls to 0 along a cosine.
        seed: of the weights, the batches and the augmentation.
        checkpoint_every: iterations between two checkpoints.
        threads: CPU threads; None: as torch has it.
        impl: implementation of the loss; None: the fastest.
        device: "cpu" or "cuda".

    Raises:
        TypeError, ValueError: naming the option, what was given and what is expected.
    """

    data: str = "glyphs"
    loss: str = "smooth-ap"
    output: str = "runs/train"
    iterations: int = 150
    batch_classes: int = 256
    samples_per_class: int = 4
    temperature: float = 0.01
    lr: float = 4e-3
    seed: int = 0
    checkpoint_every: int = 50
    threads: int | None = None
    impl: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        training_loss(self.loss)
        least = {"iterations": 1, "batch_classes": 2, "samples_per_class": 2, "checkpoint_every": 1}
        for name, smallest in (least if self.threads is None else {**least, "threads": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        check_positive(self.temperature, "temperature")
        check_positive(self.lr, "lr")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected cpu, got 'cuda', and PyTorch finds no CUDA device here")

    def folder(self) -> Path:
        return Path(self.output)

    def check_continues(self, saved: Mapping[str, Any]) -> None:
        """Whether a run with the ``saved`` options can go on with these: all that its weights depend on is equal.

        Raises:
            ValueError: naming the first option that differs.
        """
        free = {"output", "checkpoint_every", "threads"}
        given = asdict(self)
        for name in (field.name for field in fields(self) if field.name not in free):
            if given[name] != saved[name]:
                raise ValueError(f"{name}: expected {saved[name]!r} as in the run to be resumed, got {given[name]!r}")
