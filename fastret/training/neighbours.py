"""The test of NPID: how often an image's nearest neighbours vote for its class, as a network is judged without labels.

The 200 nearest training images vote, each with exp(cosine / 0.07) (`fastret.retrieval.knn_classify`); of fewer than
2,000 images only the nearest tenth, as among few all would vote. A loss with a memory bank has their embeddings there,
of the views it trained on; otherwise they are embedded as they are. Where the classes to be found are not those of the
training images, the other images to be found vote.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastret.losses import NPID
from fastret.retrieval import knn_classify
from fastret.retrieval.metrics import rank_metrics
from fastret.training.evaluation import Judge, Scores, embed, score
from fastret.training.sources import RetrievalData

NEIGHBOURS = 200
IMAGES_A_NEIGHBOUR = 10  # at least, of those that could vote
TEMPERATURE = 0.07
RANKS = 10


@dataclass(frozen=True)
class Neighbours(Scores):
    """Top-1 accuracy of the vote, and how often the class is among the nearest, as `fastret.retrieval` defines it."""

    knn: float = score("kNN top-1")
    recall_at_1: float = score("R@1")
    recall_at_10: float = score("R@10")


def evaluate_neighbours(model: nn.Module, loss: nn.Module, data: RetrievalData, device: str) -> Neighbours:
    """The vote, and recall by the network's embeddings of both sides."""
    queries, labels = embed(model, data.queries.images, device), data.queries.labels.to(device)
    gallery = None if data.gallery is None else embed(model, data.gallery.images, device)
    gallery_labels = None if data.gallery is None else data.gallery.labels.to(device)
    ranks = min(RANKS, len(queries) - 1 if gallery is None else len(gallery))  # a smaller set has no more to search
    found = rank_metrics(queries, labels, ("recall",), (1, ranks), gallery, gallery_labels)
    voters = _bank(loss, data)
    return Neighbours(
        _accuracy(queries, gallery if voters is None else voters, data), found["recall@1"], found[f"recall@{ranks}"]
    )


def vote(model: nn.Module, loss: nn.Module, data: RetrievalData, device: str) -> float:
    """Top-1 accuracy of the vote alone: with a bank only the queries are embedded."""
    voters = _bank(loss, data)
    if voters is None and data.gallery is not None:
        voters = embed(model, data.gallery.images, device)
    return _accuracy(embed(model, data.queries.images, device), voters, data)


def _bank(loss: nn.Module, data: RetrievalData) -> Tensor | None:
    """The memory of the training images, where it is them that vote."""
    return loss.bank.memory if isinstance(loss, NPID) and data.gallery is data.train else None


def _accuracy(queries: Tensor, gallery: Tensor | None, data: RetrievalData) -> float:
    labels = data.queries.labels.to(queries.device)
    voters = labels if data.gallery is None else data.gallery.labels.to(queries.device)
    others = len(voters) - (gallery is None)
    k = min(NEIGHBOURS, max(1, math.ceil(others / IMAGES_A_NEIGHBOUR)))
    classes, _ = knn_classify(queries, gallery, voters, k=k, temperature=TEMPERATURE, progress=False)
    return (classes[:, 0] == labels).to(torch.float64).mean().item()


BY_NEIGHBOURS = Judge(Neighbours, evaluate_neighbours, "Neighbours of {images:,} images", vote)
