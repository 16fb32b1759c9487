"""The losses that `fastret train` knows, by name. A new one is one entry of LOSSES."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastret.losses import NTXent, SmoothAP


@dataclass(frozen=True)
class LossSettings:
    """What a loss is built from.

    Attributes:
        temperature: in units of the cosine.
        samples_per_class: rows of each class in every batch; they stand in consecutive blocks.
        impl: as the losses' ``impl=``; None: the fastest.
    """

    temperature: float
    samples_per_class: int
    impl: str | None


@dataclass(frozen=True)
class TrainingLoss:
    """A loss for the trainer.

    Attributes:
        build: gives a module to be called with embeddings (n, dim) and labels (n,).
        official: what the official code stores, in words.
        official_bytes: its peak for a batch of n rows.
    """

    build: Callable[[LossSettings], nn.Module]
    official: str
    official_bytes: Callable[[int], int]


def _smooth_ap(settings: LossSettings) -> nn.Module:
    return SmoothAP(settings.temperature, samples_per_class=settings.samples_per_class, impl=settings.impl)


def _smooth_ap_official_bytes(n: int) -> int:
    # At its peak the official forward and backward hold 9.1 float32 tensors of n x n x n (measured).
    return round(9.1 * 4 * n**3)


def _nt_xent(settings: LossSettings) -> nn.Module:
    return NTXent(settings.temperature, impl=settings.impl)


def _nt_xent_official_bytes(n: int) -> int:
    # At its peak the dense forward and backward hold 3.3 float32 matrices of n x n (measured).
    return round(3.3 * 4 * n**2)


LOSSES: dict[str, TrainingLoss] = {
    "smooth-ap": TrainingLoss(_smooth_ap, "N x N x N tensors", _smooth_ap_official_bytes),
    "nt-xent": TrainingLoss(_nt_xent, "N x N matrices of logits", _nt_xent_official_bytes),
}


def training_loss(name: str) -> TrainingLoss:
    """The entry of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
