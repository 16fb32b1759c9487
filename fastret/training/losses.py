"""The losses that `fastret train` knows, by name. A new one is one entry of LOSSES."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastret.losses import MultiSimilarity, NTXent, SmoothAP, SupCon


@dataclass(frozen=True)
class LossSettings:
    """What a loss is built from.

    Attributes:
        temperature: in units of the cosine; multi-similarity has none.
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
        official: what the official code, or pytorch-metric-learning, stores, in words.
        official_bytes: its peak for a batch of n rows, k of each class.
    """

    build: Callable[[LossSettings], nn.Module]
    official: str
    official_bytes: Callable[[int, int], int]


def _smooth_ap(settings: LossSettings) -> nn.Module:
    return SmoothAP(settings.temperature, samples_per_class=settings.samples_per_class, impl=settings.impl)


def _nt_xent(settings: LossSettings) -> nn.Module:
    return NTXent(settings.temperature, impl=settings.impl)


def _sup_con(settings: LossSettings) -> nn.Module:
    return SupCon(settings.temperature, impl=settings.impl)


def _multi_similarity(settings: LossSettings) -> nn.Module:
    return MultiSimilarity(2.0, 40.0, 0.5, mining_margin=0.1, impl=settings.impl)  # the official configuration


# How many float32 tensors of the named size their forward and backward hold at the peak (measured).
def _smooth_ap_bytes(n: int, k: int) -> int:
    return round(9.1 * 4 * n**3)


def _nt_xent_bytes(n: int, k: int) -> int:
    return round(4.25 * 4 * n * (k - 1) * n * (n - k))


def _sup_con_bytes(n: int, k: int) -> int:
    return round(11.3 * 4 * n**2)


def _multi_similarity_bytes(n: int, k: int) -> int:
    return round(17.0 * 4 * n**2)


LOSSES: dict[str, TrainingLoss] = {
    "smooth-ap": TrainingLoss(_smooth_ap, "the official code's N x N x N tensors", _smooth_ap_bytes),
    "nt-xent": TrainingLoss(_nt_xent, "pytorch-metric-learning's tables of positive x negative pairs", _nt_xent_bytes),
    "sup-con": TrainingLoss(_sup_con, "pytorch-metric-learning's N x N matrices", _sup_con_bytes),
    "multi-similarity": TrainingLoss(
        _multi_similarity, "pytorch-metric-learning's N x N matrices", _multi_similarity_bytes
    ),
}


def training_loss(name: str) -> TrainingLoss:
    """The entry of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
