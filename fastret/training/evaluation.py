"""How well a network retrieves images of classes it never saw."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastret.data import ImageSet
from fastret.retrieval.metrics import rank_metrics

BATCH = 1024  # images embedded at once


@dataclass(frozen=True)
class Retrieval:
    """Leave-one-out over all images of a set: shares in [0, 1], as `fastret.retrieval` defines them."""

    recall_at_1: float
    recall_at_10: float
    map_at_r: float


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


def evaluate(model: nn.Module, data: ImageSet, device: str) -> Retrieval:
    """Recall@1, recall@10 and MAP@R of ``data``'s images among themselves."""
    embeddings = embed(model, data.images, device)
    ten = min(10, len(embeddings) - 1)  # a smaller set has no more to search
    found = rank_metrics(embeddings, data.labels.to(device), ("recall", "map-at-r"), ks=(1, ten))
    return Retrieval(found["recall@1"], found[f"recall@{ten}"], found["map-at-r"])
