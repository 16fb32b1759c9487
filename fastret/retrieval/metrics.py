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

Queries without a match are excluded; ``queries_without_match`` counts them.

Cost: one N x M matmul and a selection of each query's nearest (``fastret.ops.topk``), as many as the metric looks at
(the largest k or R); mAP ranks all M rows; ``rank_metrics`` takes several from one ranking. Memory: a fixed budget for
the ranks of a block of queries; nothing is N x M, and rows are read where they lie.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.ops.checks import check_labels, check_rows
from fastret.ops.topk import topk
from fastret.retrieval.search import BUDGET, bar, check_finite, rows_at_once, serving

# What a metric makes of a block, the matches in rank order (queries, ranks) bool and R (queries,): a number a query.
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
    progress: bool = True,
) -> dict[int, float]:
    """Share of queries with a match among their k nearest, for each k; formulas and cost: top of this file.

    Args:
        embeddings: (N, D) queries, floating point, finite.
        labels: (N,) integers, any values in any order.
        ks: numbers of neighbours, each between 1 and the size of the gallery (N - 1 without one).
        gallery: (M, D) rows to search; None: the embeddings themselves, each query left out.
        gallery_labels: (M,) integers, given exactly when gallery is.
        progress: a bar where it takes more than a few seconds.

    Returns:
        {k: recall@k}, each in [0, 1].

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected; among them that no query has
            a match.
    """
    found = rank_metrics(embeddings, labels, ("recall",), ks, gallery, gallery_labels, progress)
    return {k: found[f"recall@{k}"] for k in ks}


def r_precision(
    embeddings: Tensor,
    labels: Tensor,
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    progress: bool = True,
) -> float:
    """Share of matches among a query's R nearest, averaged over queries; arguments and errors as in recall_at_k."""
    return rank_metrics(embeddings, labels, ("r-precision",), (), gallery, gallery_labels, progress)["r-precision"]


def map_at_r(
    embeddings: Tensor,
    labels: Tensor,
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    progress: bool = True,
) -> float:
    """Mean over queries of average precision within the R nearest; arguments and errors as in recall_at_k."""
    return rank_metrics(embeddings, labels, ("map-at-r",), (), gallery, gallery_labels, progress)["map-at-r"]


def mean_average_precision(
    embeddings: Tensor,
    labels: Tensor,
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    progress: bool = True,
) -> float:
    """Mean over queries of average precision over the whole ranking; arguments and errors as in recall_at_k."""
    return rank_metrics(embeddings, labels, ("map",), (), gallery, gallery_labels, progress)["map"]


def rank_metrics(
    embeddings: Tensor,
    labels: Tensor,
    metrics: Sequence[str],
    ks: Sequence[int] = (),
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Several metrics from one ranking: "recall" (at each of ks: recall@1, ...), "r-precision", "map-at-r", "map".

    The other arguments, and errors, are as in ``recall_at_k``.
    """
    _check(embeddings, labels, gallery, gallery_labels)
    wanted: dict[str, tuple[int | str, PerQuery]] = {}
    for metric in metrics:
        if metric == "recall":
            _check_ks(ks, len(embeddings) - 1 if gallery is None else len(gallery))
            wanted |= {f"recall@{k}": (k, _found(k)) for k in ks}
        else:
            wanted[metric] = _OF_RANKING[metric]
    ranks = {rank for rank, _ in wanted.values()}

    def all_of_them(matches: Tensor, count: Tensor) -> Tensor:
        return torch.stack([metric(matches, count).float() for _, metric in wanted.values()], 1)

    rankings = _rankings(ranks, embeddings, labels, gallery, gallery_labels, progress)
    values = [all_of_them(matches, count) for matches, count in rankings if len(count)]
    if not values:
        raise ValueError("labels: expected at least one query with a match among the rows to search, got none")
    return dict(zip(wanted, torch.cat(values).cpu().double().mean(0).tolist(), strict=True))


def queries_without_match(labels: Tensor, gallery_labels: Tensor | None = None) -> int:
    """How many queries these metrics exclude: no row to search has their label.

    Args:
        labels: (N,) integers, of the queries.
        gallery_labels: (M,) integers; None: the queries are searched, each left out of its own result.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    check_labels(labels, labels, "labels")
    if gallery_labels is None:
        return int((_matches(labels, labels) == 1).sum())
    check_labels(gallery_labels, gallery_labels, "gallery_labels")
    return int((_matches(labels, gallery_labels) == 0).sum())


def _found(k: int) -> PerQuery:
    """Whether there is a match among the first k."""
    return lambda matches, _: matches[:, :k].any(1)


def _within(matches: Tensor, count: Tensor) -> Tensor:
    """(queries, ranks) whether a rank is among the query's first R."""
    return torch.arange(matches.shape[1], device=matches.device) < count[:, None]


def _average_precision(matches: Tensor, count: Tensor) -> Tensor:
    rank = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    return (matches.cumsum(1) / rank * matches).sum(1) / count


def _average_precision_at_r(matches: Tensor, count: Tensor) -> Tensor:
    return _average_precision(matches & _within(matches, count), count)


def _precision_at_r(matches: Tensor, count: Tensor) -> Tensor:
    return (matches & _within(matches, count)).sum(1) / count


# How many ranks are looked at, and what is made of them.
_OF_RANKING: dict[str, tuple[int | str, PerQuery]] = {
    "r-precision": (UP_TO_R, _precision_at_r),
    "map-at-r": (UP_TO_R, _average_precision_at_r),
    "map": (ALL, _average_precision),
}


def _rankings(
    ranks: Collection[int | str],
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """For blocks of queries, those with a match: whether each rank is one (queries, ranks) bool, and R (queries,)."""
    rows = embeddings if gallery is None else gallery
    row_labels = labels if gallery_labels is None else gallery_labels
    count = _matches(labels, row_labels)
    size = len(rows)
    if gallery is None:  # the query itself does not count
        count -= 1
        size -= 1
    # Those with the most matches first: a block looks at as many ranks as its first query needs.
    order = count.argsort(descending=True, stable=True)[: int((count > 0).sum())]
    number = torch.arange(len(rows), device=rows.device)
    impl = serving("topk", embeddings)
    begin = 0
    with bar(len(order), "search", "query", progress) as shown:
        while begin < len(order):
            most = {ALL: size, UP_TO_R: int(count[order[begin]])}
            depth = max(most[wanted] if isinstance(wanted, str) else wanted for wanted in ranks)
            block = order[begin : begin + min(max(1, BUDGET // depth), rows_at_once(rows))]
            others = PairMask(distinct=(block, number)) if gallery is None else None
            _, nearest = topk(embeddings[block], rows, k=depth, mask=others, impl=impl)
            yield row_labels[nearest] == labels[block, None], count[block]
            begin += len(block)
            shown.update(len(block))


def _matches(labels: Tensor, row_labels: Tensor) -> Tensor:
    """(queries,) the number of rows with the query's label."""
    values, inverse = torch.cat([labels.long(), row_labels.long()]).unique(return_inverse=True)
    query, row = inverse[: len(labels)], inverse[len(labels) :]
    matches: Tensor = row.bincount(minlength=len(values))[query]
    return matches


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
    check_finite(embeddings, "embeddings")
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery, gallery_labels: expected both or neither")
    if gallery is not None and gallery_labels is not None:
        check_rows(gallery, "gallery", like=embeddings)
        check_labels(gallery_labels, gallery, "gallery_labels")
        check_finite(gallery, "gallery")
