"""knn_vote: the classes that nearest neighbours vote for, with weights that fall with the distance.

    v_qc = sum over the neighbours j of q with place_j = c of exp(scale (s_qj - s_q0)),    share of c: v_qc / sum of v_q

Of equal shares the lower class comes first. Where the neighbours have fewer classes than are asked for, the rest has
share 0 and class -1. Results carry no gradient.

Cost: k log k comparisons a query (cuda), or a table of C classes (tiled). Memory: the results, or the table.

The interface of an implementation, ``fastret.backends.*.knn_vote``:

    forward(scores, indices, place, classes, *, scale, top) -> (winners, shares)

with scores (Q, k) float32 or float64, best first; indices (Q, k) int64, -1 where nobody is; place (M,) int64 from 0 to
classes - 1; winners (Q, top) int64; shares (Q, top) of the dtype of scores.
"""

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.ops import checks


def knn_vote(
    scores: Tensor,
    indices: Tensor,
    place: Tensor,
    classes: int,
    *,
    scale: float = 1.0,
    top: int = 1,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The vote of every query's neighbours; formula and ties stand at the top of this file.

    Args:
        scores: (Q, k) float32 or float64, as ``topk`` returns them. indices: (Q, k) integers, likewise.
        place: (M,) integers from 0 to ``classes`` - 1, the class of every row that indices may name.
        classes: C, at least 0.
        scale: of the scores in the exponent: 1 / temperature, negative for distances, 0 to count heads.
        top: how many classes a query.
        impl: "reference", "tiled" or "cuda"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        (winners, shares), both (Q, top): int64, the most voted for first; shares of the vote in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(scores, "scores")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores: expected float32 or float64, got {scores.dtype}")
    if indices.shape != scores.shape or indices.dtype not in checks.INTEGERS or indices.device != scores.device:
        raise ValueError(
            f"indices: expected integers of shape {tuple(scores.shape)} on {scores.device}, got {indices.dtype} "
            f"{tuple(indices.shape)} on {indices.device}"
        )
    if place.dim() != 1 or place.dtype not in checks.INTEGERS or place.device != scores.device:
        raise ValueError(
            f"place: expected a vector of integers on {scores.device}, got {place.dtype} {tuple(place.shape)} on "
            f"{place.device}"
        )
    checks.check_integer(classes, "classes", 0)
    checks.check_count(top, "top")
    checks.check_range(place, classes, "place")
    checks.check_range(indices, len(place), "indices", negative=True)
    chosen = registry.resolve("knn_vote", scores.device, scores.dtype, impl)
    winners, shares = (
        registry.IMPLEMENTATIONS[chosen]
        .module("knn_vote")
        .forward(scores.detach(), indices.to(torch.int64), place.to(torch.int64), classes, scale=scale, top=top)
    )
    return winners, shares
