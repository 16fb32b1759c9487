"""Retrieval metrics of embeddings under cosine similarity.

For a query q let rel_i say whether the i-th nearest gallery row has q's label, P@i = (rel_1 + ... + rel_i) / i, and
R = the number of gallery rows with q's label. Then, each a mean over the queries with R > 0,

    recall@k      [rel_1 + ... + rel_k > 0]
    R-precision   P@R
    MAP@R         1/R sum over i <= R of P@i rel_i
    mAP           1/R sum over all i of P@i rel_i

Recall@k here is the one of Jegou et al. (PAMI 2011) and Song et al. (CVPR 2016); MAP@R is from Musgrave, Belongie, Lim:
A Metric Learning Reality Check, ECCV 2020. Without a gallery the embeddings are their own, each query left out.
Rows are normalised as torch.nn.functional.normalize does; equal scores are ranked by gallery index, the lower first.

Cost: one N x M matmul and a selection of each query's nearest, as many as the metric looks at (the largest k or R); mAP
sorts all M scores. Memory: a copy of the normalised rows and a fixed budget for a block of queries, O(block x M);
nothing is N x M.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype, row_norms
from fastret.ops.checks import check_labels, check_rows

# Scores ranked at once: fewer leave the matmul too few rows, more leave the cache.
BUDGET = 1 << 21

# What a metric makes of a block: the matches in rank order (queries, ranks) bool and R (queries,), to one row a query.
PerQuery = Callable[[Tensor, Tensor], Tensor]

# How many ranks a metric looks at, where that is no fixed number.
UP_TO_R, ALL = "up to R", "all"


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = (1, 10),
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> dict[int, float]:
    """Share of queries with a match among their k nearest, for each k; formulas and cost: top of this file.

    Args:
        embeddings: (N, D) queries, floating point, finite.
        labels: (N,) integers, any values in any order.
        ks: numbers of neighbours, each between 1 and the size of the gallery (N - 1 without one).
        gallery: (M, D) rows to search; None: the embeddings themselves, each query left out.
        gallery_labels: (M,) integers, given exactly when gallery is.

    Returns:
        {k: recall@k}, each in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected; among them that no query has
            a match.
    """
    _check(embeddings, labels, gallery, gallery_labels)
    _check_ks(ks, len(embeddings) - 1 if gallery is None else len(gallery))

    def found(matches: Tensor, _: Tensor) -> Tensor:
        return _found(matches, ks)

    return dict(zip(ks, _mean(found, (max(ks),), embeddings, labels, gallery, gallery_labels).tolist(), strict=True))


def r_precision(
    embeddings: Tensor, labels: Tensor, *, gallery: Tensor | None = None, gallery_labels: Tensor | None = None
) -> float:
    """Share of matches among a query's R nearest, averaged over queries; arguments and errors as in recall_at_k."""
    _check(embeddings, labels, gallery, gallery_labels)

    def precision(matches: Tensor, count: Tensor) -> Tensor:
        return (matches & _within(matches, count)).sum(1) / count

    return float(_mean(precision, (UP_TO_R,), embeddings, labels, gallery, gallery_labels))


def map_at_r(
    embeddings: Tensor, labels: Tensor, *, gallery: Tensor | None = None, gallery_labels: Tensor | None = None
) -> float:
    """Mean over queries of average precision within the R nearest; arguments and errors as in recall_at_k."""
    _check(embeddings, labels, gallery, gallery_labels)

    return float(_mean(_average_precision_at_r, (UP_TO_R,), embeddings, labels, gallery, gallery_labels))


def mean_average_precision(
    embeddings: Tensor, labels: Tensor, *, gallery: Tensor | None = None, gallery_labels: Tensor | None = None
) -> float:
    """Mean over queries of average precision over the whole ranking; arguments and errors as in recall_at_k."""
    _check(embeddings, labels, gallery, gallery_labels)
    return float(_mean(_average_precision, (ALL,), embeddings, labels, gallery, gallery_labels))


def recall_and_map_at_r(embeddings: Tensor, labels: Tensor, *, ks: Sequence[int]) -> tuple[dict[int, float], float]:
    """``recall_at_k`` and ``map_at_r`` of the embeddings among themselves, from one ranking instead of two."""
    _check(embeddings, labels, None, None)
    _check_ks(ks, len(embeddings) - 1)

    def both(matches: Tensor, count: Tensor) -> Tensor:
        precision = _average_precision_at_r(matches, count)
        return torch.cat([_found(matches, ks).to(precision.dtype), precision[:, None]], 1)

    *recalls, precision = _mean(both, (max(ks), UP_TO_R), embeddings, labels, None, None).tolist()
    return dict(zip(ks, recalls, strict=True)), precision


def _found(matches: Tensor, ks: Sequence[int]) -> Tensor:
    """(queries, len(ks)) whether there is a match among the first k."""
    return torch.stack([matches[:, :k].any(1) for k in ks], 1)


def _within(matches: Tensor, count: Tensor) -> Tensor:
    """(queries, ranks) whether a rank is among the query's first R."""
    return torch.arange(matches.shape[1], device=matches.device) < count[:, None]


def _average_precision(matches: Tensor, count: Tensor) -> Tensor:
    rank = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    return (matches.cumsum(1) / rank * matches).sum(1) / count


def _average_precision_at_r(matches: Tensor, count: Tensor) -> Tensor:
    return _average_precision(matches & _within(matches, count), count)


def _mean(
    metric: PerQuery,
    ranks: tuple[int | str, ...],
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
) -> Tensor:
    """The metric's mean over the queries that have a match, in float64 on the CPU."""
    rankings = _rankings(ranks, embeddings, labels, gallery, gallery_labels)
    values = [metric(matches, count) for matches, count in rankings if len(count)]
    if not values:
        raise ValueError("labels: expected at least one query with a match among the rows to search, got none")
    return torch.cat(values).cpu().double().mean(0)


def _rankings(
    ranks: tuple[int | str, ...],
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For blocks of queries, those with a match: whether each rank is one (queries, ranks) bool, and R (queries,)."""
    queries = _unit(embeddings)
    rows = queries if gallery is None else _unit(gallery)
    row_labels = labels if gallery_labels is None else gallery_labels
    shared = torch.promote_types(queries.dtype, rows.dtype)
    queries, rows = queries.to(shared), rows.to(shared)
    count = _matches(labels, row_labels)
    size = len(rows)
    if gallery is None:  # the query itself comes last, to be cut off
        count -= 1
        size -= 1
    most = {ALL: size, UP_TO_R: int(count.max()) if len(count) else 0}
    depth = max(most[wanted] if isinstance(wanted, str) else wanted for wanted in ranks)
    block = max(1, BUDGET // max(1, len(rows)))
    for begin in range(0, len(queries), block):
        with torch.autocast(rows.device.type, enabled=False):  # ranks want the precision the rows came in
            scores = queries[begin : begin + block] @ rows.T
        if gallery is None:
            scores.diagonal(begin).fill_(-torch.inf)
        matches = row_labels[_nearest(scores, depth)] == labels[begin : begin + block, None]
        found = count[begin : begin + block]
        yield matches[found > 0], found[found > 0]


def _matches(labels: Tensor, row_labels: Tensor) -> Tensor:
    """(queries,) the number of rows with the query's label."""
    values, inverse = torch.cat([labels.long(), row_labels.long()]).unique(return_inverse=True)
    query, row = inverse[: len(labels)], inverse[len(labels) :]
    return row.bincount(minlength=len(values))[query]


def _nearest(scores: Tensor, depth: int) -> Tensor:
    """(queries, depth) columns of the largest scores in descending order, the lower column first among equal ones."""
    if depth == 0 or depth + 1 >= scores.shape[1]:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :depth]
    # One more than wanted shows whether equal scores lie on both sides of the cut: then topk's choice is arbitrary.
    best, column = scores.topk(depth + 1, dim=1)
    split = best[:, depth - 1] == best[:, depth]
    column = column[:, :depth].sort(dim=1).values
    column = column.gather(1, scores.gather(1, column).argsort(dim=1, descending=True, stable=True))
    if bool(split.any()):
        column[split] = scores[split].argsort(dim=1, descending=True, stable=True)[:, :depth]
    return column


def _unit(x: Tensor) -> Tensor:
    wide = x.detach().to(accumulation_dtype(x.dtype))
    return wide / row_norms(wide)


def _check_ks(ks: Sequence[int], size: int) -> None:
    if len(ks) == 0:
        raise ValueError("ks: expected at least one k, got none")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"ks: expected integers, got {type(k).__name__}")
        if not 1 <= k <= size:
            raise ValueError(f"ks: expected numbers between 1 and the {size} rows to search, got {k}")


def _check(embeddings: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None) -> None:
    check_rows(embeddings, "embeddings")
    check_labels(labels, embeddings, "labels")
    _check_finite(embeddings, "embeddings")
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery, gallery_labels: expected both or neither")
    if gallery is not None and gallery_labels is not None:
        check_rows(gallery, "gallery", like=embeddings)
        check_labels(gallery_labels, gallery, "gallery_labels")
        _check_finite(gallery, "gallery")


def _check_finite(x: Tensor, name: str) -> None:
    """NaN has no place in a ranking, and would be counted as a miss or a hit depending on the sort."""
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
