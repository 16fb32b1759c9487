"""Normalised mutual information of the clusters of embeddings and their labels.

    NMI = I(cluster; label) / ((H(cluster) + H(label)) / 2)

for the clusters that ``fastret.retrieval.kmeans`` finds: Manning, Raghavan, Schuetze, Introduction to Information
Retrieval, section 16.3; the mean of the entropies is the arithmetic one, as in scikit-learn and the metric learning
papers. 1 where there is one cluster and one label.
"""

import torch
from torch import Tensor

from fastret.ops import checks
from fastret.retrieval.kmeans import kmeans


def nmi(
    embeddings: Tensor,
    labels: Tensor,
    *,
    num_clusters: int | None = None,
    iterations: int = 25,
    seed: int | torch.Generator = 0,
    init: str = "random",
    metric: str = "cosine",
    progress: bool = True,
    impl: str | None = None,
) -> float:
    """How much clusters tell of labels; formula at the top of this file.

    Cost and memory: those of ``kmeans``, and O(N) for the pairs of cluster and label that occur.

    Args:
        embeddings: (N, D) rows, floating point, finite; at least one.
        labels: (N,) integers, any values in any order.
        num_clusters: k; None: the number of different labels.
        iterations, seed, init, metric, progress, impl: as in ``kmeans``.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(embeddings, "embeddings")
    checks.check_labels(labels, embeddings, "labels")
    if not len(labels):
        raise ValueError("embeddings: expected at least one row, got none")
    checks.check_count(num_clusters, "num_clusters")
    if num_clusters is not None and num_clusters > len(labels):
        raise ValueError(f"num_clusters: expected at most the {len(labels)} rows, got {num_clusters}")
    found = kmeans(
        embeddings,
        len(labels.unique()) if num_clusters is None else num_clusters,
        iterations=iterations,
        seed=seed,
        init=init,
        metric=metric,
        progress=progress,
        impl=impl,
    )
    return mutual_information(found.assignment.cpu(), labels.cpu())


def mutual_information(one: Tensor, other: Tensor) -> float:
    """NMI of two labellings (N,) of the same rows."""
    (first, p), (second, q) = _places(one), _places(other)
    if len(p) == len(q) == 1:
        return 1.0
    pairs, count = (first * len(q) + second).unique(return_counts=True)  # those that occur, at most N
    joint = count.double() / len(one)
    information = (joint * (joint / (p[pairs // len(q)] * q[pairs % len(q)])).log()).sum()
    return min(1.0, max(0.0, float(information / ((_entropy(p) + _entropy(q)) / 2))))


def _places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels counted from 0 (N,), and the share of each."""
    _, place, count = labels.unique(return_inverse=True, return_counts=True)
    return place, count.double() / len(labels)


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.log()).sum()
