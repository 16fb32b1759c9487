"""How well a network retrieves the images it is judged by, as a `Judge` finds out."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from fastret.data import ImageSet
from fastret.retrieval.metrics import rank_metrics
from fastret.training.sources import RetrievalData

BATCH = 1024  # images embedded at once


def score(name: str) -> float:
    """A field of `Scores` that people know as ``name``."""
    found: float = field(metadata={"name": name})
    return found


@dataclass(frozen=True)
class Scores:
    """What an evaluation finds: every field is a share in [0, 1], declared with `score`."""

    def named(self) -> dict[str, float]:
        return {part.metadata["name"]: getattr(self, part.name) for part in fields(self)}

    def first(self) -> float:
        """The one that a curve follows."""
        return next(iter(self.named().values()))


@dataclass(frozen=True)
class Judge:
    """How the network of a loss is evaluated.

    Attributes:
        scores: the type of what it finds.
        evaluate: finds it for a network, its loss and the data, on a device.
        title: of its figures, as a format of the queries' ``images`` and ``classes``.
        after_epoch: finds the first of the scores alone, for a curve; None: there is none.
        yardsticks: what retrieval comes to without a network, by name; from the data and the bits of a code.
    """

    scores: type[Scores]
    evaluate: Callable[[nn.Module, nn.Module, RetrievalData, str], Scores]
    title: str
    after_epoch: Callable[[nn.Module, nn.Module, RetrievalData, str], float] | None = None
    yardsticks: Callable[[RetrievalData, int | None], dict[str, float]] = lambda data, bits: {}


@dataclass(frozen=True)
class Retrieval(Scores):
    """By class, as `fastret.retrieval` defines them."""

    recall_at_1: float = score("R@1")
    recall_at_10: float = score("R@10")
    map_at_r: float = score("MAP@R")


def embed(model: nn.Module, images: Tensor, device: str) -> Tensor:
    """(n, dim) embeddings of (n, c, h, w) uint8 images, in evaluation mode; the model's mode is kept."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [images[begin : begin + BATCH] for begin in range(0, len(images), BATCH)]
            return torch.cat([model(part.to(device)) for part in parts])
    finally:
        model.train(training)


def evaluate(model: nn.Module, data: ImageSet, device: str, gallery: ImageSet | None = None) -> Retrieval:
    """Recall@1, recall@10 and MAP@R of ``data``'s images among the gallery's; without one, among themselves."""
    embeddings, labels = embed(model, data.images, device), data.labels.to(device)
    searched = len(embeddings) - 1 if gallery is None else len(gallery.images)
    ten = min(10, searched)  # a smaller set has no more to search
    rows = None if gallery is None else embed(model, gallery.images, device)
    row_labels = None if gallery is None else gallery.labels.to(device)
    found = rank_metrics(embeddings, labels, ("recall", "map-at-r"), (1, ten), rows, row_labels)
    return Retrieval(found["recall@1"], found[f"recall@{ten}"], found["map-at-r"])


def _evaluate(model: nn.Module, loss: nn.Module, data: RetrievalData, device: str) -> Retrieval:
    return evaluate(model, data.queries, device, data.gallery)


BY_CLASS = Judge(Retrieval, _evaluate, "Retrieval of {classes:,} unseen classes")
