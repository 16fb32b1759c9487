"""What a training run depends on; what is not given is as the loss's recipe has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastret.ops.checks import check_number, check_positive
from fastret.training.losses import Recipe, training_loss
from fastret.training.spq import BITS

# Stands for a value of the loss's recipe, which takes its place when the options are made: nobody reads it from them.
_AS_RECIPE: Any = None

# Options that only some losses have, and what the others lack.
PARTS = {
    "temperature": "temperature",
    "filters": "convolutions",
    "proxy_lr": "proxies",
    "bits": "codes",
    "num_noise": "noise",
    "momentum": "memory or key network",
    "mix": "mixed images",
    "patch_size": "patches",
    "test_every": "test after an epoch",
}
COUNTS = ("filters", "num_noise", "mix", "patch_size", "test_every")


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run; equal ones give equal weights on the same machine with the same number of threads.

    What `Recipe` has, from iterations to test_every, is by default as it has it for the loss.

    Attributes:
        data: a name in `fastret.training.sources.SOURCES`, a directory with one folder of images a class, or an .npz of
            scripts/render_glyphs.py.
        loss: a name in `fastret.training.losses.LOSSES`.
        output: folder of checkpoint.pt, metrics.json and plot.png.
        iterations: number of batches.
        batch_classes: classes of a batch; all there are where the data has fewer. For a loss without labels every image
            is a class.
        samples_per_class: images of each class in a batch; without labels, views of each image.
        temperature: of the loss, in units of the cosine; None for a loss without one.
        filters: channels of the network's first block; the other two have twice and four times as many. None for a
            network without convolutions.
        lr: AdamW's learning rate at the start; it falls to 0 along a cosine.
        proxy_lr: likewise, of the loss's own parameters, proxies or words of a codebook; None for a loss without any.
        bits: of an image's code; None for a loss without codes.
        num_noise: images that each image is told from, drawn from all; None for a loss without noise.
        momentum: share of what was there before, in the memory of an image or the key network; None for a loss without.
        mix: images of which patches make a mixed one; None where none are mixed, and so
        patch_size: side of such a patch, and of the tokens of the network, in pixels.
        test_every: epochs, passes over the training images, between two tests; None for a loss that is tested only at
            the end.
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
    iterations: int = _AS_RECIPE
    batch_classes: int = _AS_RECIPE
    samples_per_class: int = _AS_RECIPE
    temperature: float | None = None
    filters: int | None = None
    lr: float = _AS_RECIPE
    proxy_lr: float | None = None
    bits: int | None = None
    num_noise: int | None = None
    momentum: float | None = None
    mix: int | None = None
    patch_size: int | None = None
    test_every: int | None = None
    seed: int = 0
    checkpoint_every: int = 50
    threads: int | None = None
    impl: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        loss = training_loss(self.loss)
        for field in fields(Recipe):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, getattr(loss.recipe, field.name))
        least = {
            "iterations": 1,
            "batch_classes": 2,
            "samples_per_class": loss.least_samples,
            **dict.fromkeys(("checkpoint_every", "threads", *COUNTS), 1),
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None:
                continue  # not given, and the loss has none
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        if loss.most_samples is not None and self.samples_per_class > loss.most_samples:
            raise ValueError(f"samples_per_class: expected at most {loss.most_samples}, got {self.samples_per_class}")
        check_positive(self.lr, "lr")
        for name, part in PARTS.items():
            value = getattr(self, name)
            if value is not None and getattr(loss.recipe, name) is None:
                raise ValueError(f"{name}: expected none, as {self.loss} has no {part}, got {value}")
            if value is not None and name != "momentum":
                check_positive(value, name)
        if self.momentum is not None:
            check_number(self.momentum, "momentum")
            if not 0 <= self.momentum <= 1:
                raise ValueError(f"momentum: expected a number from 0 to 1, got {self.momentum}")
        if self.mix is not None and self.batch_classes < 2 * self.mix - 1:
            raise ValueError(
                f"batch_classes: expected at least 2 mix - 1 = {2 * self.mix - 1}, got {self.batch_classes}"
            )
        if self.bits is not None and self.bits not in BITS:
            raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {self.bits}")
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
                raise unlike_saved(name, saved[name], given[name])


def unlike_saved(name: str, saved: object, given: object) -> ValueError:
    """The error of an option with which a saved run cannot go on."""
    return ValueError(f"{name}: expected {saved!r} as in the run to be resumed, got {given!r}")
