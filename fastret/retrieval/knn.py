"""Classification by a weighted vote of the nearest neighbours.

    v_c = sum over the k nearest j of [label_j = c] exp(s_j / temperature),      share of c: v_c / sum of v

for the scores s of ``fastret.ops.topk`` (minus squared distances under "l2"): the test of NPID (Wu et al., Unsupervised
Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018), k = 200 and temperature 0.07 there. A factor
common to a query's votes changes no share: exponents are taken from its nearest neighbour, and never overflow.
"""

import torch
from torch import Tensor

from fastret import ops
from fastret.backends import registry
from fastret.backends.pairs import PairMask
from fastret.ops import checks
from fastret.retrieval.search import BUDGET, blocks, rows_at_once


def knn_classify(
    query: Tensor,
    gallery: Tensor | None,
    labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    top: int = 1,
    metric: str = "cosine",
    progress: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The classes that the k nearest neighbours of each query vote for; formula at the top of this file.

    Of equal shares the lower label comes first. A class that no neighbour has is never among the results: where the
    neighbours have fewer than ``top`` classes, the rest has share 0 and label -1.

    Cost: that of ``fastret.retrieval.topk``. Memory: the results, and O(k + C) a query of a block, for C labels.

    Args:
        query: (N, D) rows, floating point.
        gallery: (M, D) rows with labels; None: the queries themselves, each left out of its own vote.
        labels: (M,) integers, any values in any order.
        k: neighbours that vote, at least 1; may be more than there are.
        temperature: positive; math.inf counts every neighbour alike.
        top: how many classes a query.
        metric: "cosine", "dot" or "l2".
        progress: a bar where it takes more than a few seconds.
        impl: as in ``fastret.ops.topk``.

    Returns:
        (classes, shares), both (N, top): int64 labels, the most voted for first; shares of the vote in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(query, "query")
    if gallery is not None:
        checks.check_rows(gallery, "gallery", like=query)
    rows = query if gallery is None else gallery
    checks.check_labels(labels, rows, "labels")
    if temperature != torch.inf:
        checks.check_positive(temperature, "temperature")
    checks.check_count(top, "top")
    values, place = labels.long().unique(return_inverse=True)
    sign = -1 if metric == "l2" else 1
    # with any other search the vote is PyTorch's: it is cheap beside it
    vote = "cuda" if registry.chosen(impl) == "cuda" else "tiled"
    found = []
    at_once = min(max(1, BUDGET // max(k, len(values), top)), rows_at_once(rows))
    for block in blocks(len(query), at_once, progress):
        mask = PairMask(offset=block.start) if gallery is None else None
        scores, indices = ops.topk(query[block], rows, k=k, metric=metric, mask=mask, impl=impl)
        winners, shares = ops.knn_vote(
            scores, indices, place, len(values), scale=sign / temperature, top=top, impl=vote
        )
        named = values[winners.clamp_min(0)] if len(values) else winners
        found.append((torch.where(winners >= 0, named, -1), shares))
    return torch.cat([c for c, _ in found]), torch.cat([s for _, s in found])
