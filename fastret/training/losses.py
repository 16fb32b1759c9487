"""The losses that `fastret train` knows, by name, each with its recipe. A new one is one entry of LOSSES."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastret.losses import NPID, MultiSimilarity, NTXent, PatchMixLoss, ProxyNCA, SmoothAP, SupCon
from fastret.losses.proxies import ProxyLoss
from fastret.training.codes import BY_CODE
from fastret.training.evaluation import BY_CLASS, Judge, embed
from fastret.training.model import EmbeddingNet, Network, learn_norms
from fastret.training.neighbours import BY_NEIGHBOURS
from fastret.training.patchmix import PatchMixNet
from fastret.training.spq import SPQ
from fastret.training.vit import ViT

# Images (n, c, h, w) uint8 with labels (n,).
Batches = Sequence[tuple[Tensor, Tensor]]

T = TypeVar("T")


def _given(value: T | None) -> T:
    """The value of an option that the recipe of the loss has."""
    assert value is not None
    return value


@dataclass(frozen=True)
class LossSettings:
    """What a loss is built from.

    Attributes:
        temperature: in units of the cosine; None: the loss has none.
        samples_per_class: rows of each class in every batch; they stand in consecutive blocks.
        impl: as the losses' ``impl=``; None: the fastest.
        classes: of the training data, without labels its images; labels are 0 .. classes - 1.
        width: of an embedding.
        bits, num_noise, momentum, mix: as in `Recipe`.
    """

    temperature: float | None
    samples_per_class: int
    impl: str | None
    classes: int
    width: int
    bits: int | None = None
    num_noise: int | None = None
    momentum: float | None = None
    mix: int | None = None

    @property
    def tau(self) -> float:
        """The temperature of a loss that has one."""
        return _given(self.temperature)


@dataclass(frozen=True)
class NetworkSettings:
    """What a network is built from: the shape of an image, and options as `Recipe` has them."""

    channels: int
    height: int
    width: int
    seed: int
    filters: int | None = None
    patch_size: int | None = None
    mix: int | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Options of `fastret.training.TrainOptions` that suit a loss, for those that are not given."""

    iterations: int
    batch_classes: int
    samples_per_class: int
    temperature: float | None  # None: the loss has none
    filters: int | None  # None: the network has no convolutions
    lr: float
    proxy_lr: float | None  # None: the loss has nothing to learn
    bits: int | None = None  # None: the loss has no codes
    num_noise: int | None = None  # None: the loss draws no noise
    momentum: float | None = None  # None: nothing follows the network
    mix: int | None = None  # None: images are not mixed
    patch_size: int | None = None  # None: likewise
    test_every: int | None = None  # epochs; None: there is no test after an epoch


def _convolutions(settings: NetworkSettings) -> Network:
    return EmbeddingNet(settings.channels, filters=_given(settings.filters))


def _rows_and_labels(rows: int, settings: LossSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    embeddings = torch.randn(rows, settings.width, generator=generator).requires_grad_()
    return embeddings, torch.arange(rows) // settings.samples_per_class


@dataclass(frozen=True)
class TrainingLoss:
    """A loss for the trainer.

    Attributes:
        build: gives a module to be called with the network's ``arguments``: embeddings (n, dim) and labels (n,).
        recipe: the defaults of its options.
        official: what the official code, or pytorch-metric-learning, stores, in words.
        official_bytes: its peak for a batch of n rows.
        official_at: the sizes that ``official`` speaks of, as a format of rows, images, classes, width and noise.
        least_samples: images of a class that a batch needs: 2 where positives are sought in the batch.
        most_samples: images of a class that a batch may have; None: any number.
        initialise: fits the loss to the untrained network's embeddings of all training images, before the first step.
        labelled: whether it learns from labels; otherwise every image is a class of its own, and samples of it are
            random views. They come one view of all images after the other, so that row i and row i + n are of image i.
        judge: how the network is evaluated.
        network: what is trained.
        arguments: drawn arguments of the loss for a batch of n rows, those that need a gradient marked.
    """

    build: Callable[[LossSettings], nn.Module]
    recipe: Recipe
    official: str
    official_bytes: Callable[[int, LossSettings], int]
    official_at: str = "N = {rows:,}"
    least_samples: int = 2
    most_samples: int | None = None
    initialise: Callable[[nn.Module, nn.Module, Batches], None] | None = None
    labelled: bool = True
    judge: Judge = BY_CLASS
    network: Callable[[NetworkSettings], Network] = _convolutions
    arguments: Callable[[int, LossSettings, torch.Generator], tuple[Tensor, ...]] = _rows_and_labels


def _smooth_ap(settings: LossSettings) -> nn.Module:
    return SmoothAP(settings.tau, samples_per_class=settings.samples_per_class, impl=settings.impl)


def _nt_xent(settings: LossSettings) -> nn.Module:
    return NTXent(settings.tau, impl=settings.impl)


def _sup_con(settings: LossSettings) -> nn.Module:
    return SupCon(settings.tau, impl=settings.impl)


def _multi_similarity(settings: LossSettings) -> nn.Module:
    return MultiSimilarity(2.0, 40.0, 0.5, mining_margin=0.1, impl=settings.impl)  # the official configuration


def _proxy_nca(settings: LossSettings) -> nn.Module:
    # Equal scaling of rows and proxies whose logits, 2 sx sp cosine, are cosines over the temperature.
    scaling = math.sqrt(0.5 / settings.tau)
    return ProxyNCA(settings.classes, settings.width, scaling_x=scaling, scaling_p=scaling, impl=settings.impl)


def _class_means(loss: nn.Module, model: nn.Module, batches: Batches) -> None:
    assert isinstance(loss, ProxyLoss)
    loss.init_from_loader(model, batches)


def _spq(settings: LossSettings) -> nn.Module:
    return SPQ(_given(settings.bits), settings.width, settings.tau, impl=settings.impl)


def _words(loss: nn.Module, model: nn.Module, batches: Batches) -> None:
    assert isinstance(loss, SPQ)
    loss.initialise(model, [images for images, _ in batches])


def _npid(settings: LossSettings) -> nn.Module:
    return NPID(
        settings.classes,
        settings.width,
        num_noise=_given(settings.num_noise),
        temperature=settings.tau,
        momentum=_given(settings.momentum),
        normalize=True,
        seed=int(torch.randint(2**32, ())),
        impl=settings.impl,
    )


def _bank(loss: nn.Module, model: nn.Module, batches: Batches) -> None:
    """Start the memory at the untrained network's embeddings: from random rows, short runs learn nothing."""
    assert isinstance(loss, NPID)
    images = [part for part, _ in batches]
    learn_norms(model, images)
    memory = loss.bank.memory
    memory.copy_(normalize(embed(model, torch.cat(images), str(memory.device))))


def _patchmix(settings: LossSettings) -> nn.Module:
    return PatchMixLoss(_given(settings.mix), settings.tau, impl=settings.impl)


def _patchmix_net(settings: NetworkSettings) -> Network:
    backbone = ViT(settings.channels, settings.height, settings.width, _given(settings.patch_size))
    return PatchMixNet(backbone, _given(settings.mix), _given(settings.momentum), settings.seed)


def _queries_and_keys(rows: int, settings: LossSettings, generator: torch.Generator) -> tuple[Tensor, ...]:
    """q1, k1, k2, mixed q2 and mixed k1, a row an image each."""
    shape = rows // settings.samples_per_class, settings.width
    query = (True, False, False, True, False)
    return tuple(torch.randn(shape, generator=generator).requires_grad_(needed) for needed in query)


# How many float32 tensors of the named size their forward and backward hold at the peak (measured).
def _smooth_ap_bytes(n: int, settings: LossSettings) -> int:
    return round(9.1 * 4 * n**3)


def _nt_xent_bytes(n: int, settings: LossSettings) -> int:
    k = settings.samples_per_class
    return round(4.25 * 4 * n * (k - 1) * n * (n - k))


def _sup_con_bytes(n: int, settings: LossSettings) -> int:
    return round(11.3 * 4 * n**2)


def _multi_similarity_bytes(n: int, settings: LossSettings) -> int:
    return round(17.0 * 4 * n**2)


def _proxy_nca_bytes(n: int, settings: LossSettings) -> int:
    # The code of 2019, which articles copy: distances between all rows and proxies.
    return round(6.4 * 4 * (n + settings.classes) ** 2)


def _spq_bytes(n: int, settings: LossSettings) -> int:
    return round(8.2 * 4 * n**2 * settings.width)


def _npid_bytes(n: int, settings: LossSettings) -> int:
    return round(1.05 * 4 * n * (_given(settings.num_noise) + 1) * settings.width)


def _patchmix_bytes(n: int, settings: LossSettings) -> int:
    return round(8.3 * 4 * (n // settings.samples_per_class) ** 2)


def _of_pairs(temperature: float | None) -> Recipe:
    """The quickstart's recipe: large batches with several images of a class, for losses of pairs within a batch."""
    return Recipe(
        iterations=150,
        batch_classes=256,
        samples_per_class=4,
        temperature=temperature,
        filters=16,
        lr=4e-3,
        proxy_lr=None,
    )


PML_MATRICES = "pytorch-metric-learning's N x N matrices"

LOSSES: dict[str, TrainingLoss] = {
    "smooth-ap": TrainingLoss(_smooth_ap, _of_pairs(0.01), "the official code's N x N x N tensors", _smooth_ap_bytes),
    "nt-xent": TrainingLoss(
        _nt_xent, _of_pairs(0.1), "pytorch-metric-learning's tables of positive x negative pairs", _nt_xent_bytes
    ),
    "sup-con": TrainingLoss(_sup_con, _of_pairs(0.1), PML_MATRICES, _sup_con_bytes),
    "multi-similarity": TrainingLoss(_multi_similarity, _of_pairs(None), PML_MATRICES, _multi_similarity_bytes),
    "proxy-nca": TrainingLoss(
        _proxy_nca,
        Recipe(
            iterations=1300,
            batch_classes=128,
            samples_per_class=1,
            temperature=0.05,
            filters=32,
            lr=8e-3,
            proxy_lr=2e-4,
        ),
        "the official code's (B + C) x (B + C) matrices",
        _proxy_nca_bytes,
        official_at="B = {rows:,}, C = {classes:,}",
        least_samples=1,
        initialise=_class_means,
    ),
    "spq": TrainingLoss(
        _spq,
        Recipe(
            iterations=1000,
            batch_classes=256,
            samples_per_class=2,
            temperature=0.3,
            filters=16,
            lr=4e-3,
            proxy_lr=1e-3,
            bits=32,
        ),
        "the official code's 2N x 2N x D broadcasts",
        _spq_bytes,
        official_at="2N = {rows:,}, D = {width}",
        most_samples=2,
        initialise=_words,
        labelled=False,
        judge=BY_CODE,
    ),
    "npid": TrainingLoss(
        _npid,
        Recipe(
            iterations=2344,
            batch_classes=256,
            samples_per_class=1,
            temperature=0.1,
            filters=16,
            lr=2e-3,
            proxy_lr=None,
            num_noise=4096,
            momentum=0.5,
            test_every=1,
        ),
        "the official code's B x (K + 1) x D gathered rows",
        _npid_bytes,
        official_at="B = {rows:,}, K = {noise:,}, D = {width}",
        least_samples=1,
        most_samples=1,
        initialise=_bank,
        labelled=False,
        judge=BY_NEIGHBOURS,
    ),
    "patchmix": TrainingLoss(
        _patchmix,
        Recipe(
            iterations=235,
            batch_classes=512,
            samples_per_class=2,
            temperature=0.2,
            filters=None,
            lr=2e-3,
            proxy_lr=None,
            momentum=0.95,
            mix=2,
            patch_size=4,
            test_every=1,
        ),
        "the official code's B x B logits, their softmaxes and labels",
        _patchmix_bytes,
        official_at="B = {images:,}",
        most_samples=2,
        labelled=False,
        judge=BY_NEIGHBOURS,
        network=_patchmix_net,
        arguments=_queries_and_keys,
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
