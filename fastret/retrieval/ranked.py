"""Metrics of rankings that are cut off: of indices, whatever search they come from.

mAP@n as hashing and quantisation are judged (Jang, Cho: Self-supervised Product Quantization, ICCV 2021; their code):
let rel_i say whether the i-th result of a query has its label, and P@i = (rel_1 + ... + rel_i) / i. Then

    AP@n = sum over i <= n of P@i rel_i / (rel_1 + ... + rel_n),    0 where none is relevant (of an empty gallery, too),

and mAP@n is its mean over all queries. It divides by the relevant items found, not by those there are, so a query that
finds one relevant item, first, scores 1: compare it only with itself at the same n.
"""

import torch
from torch import Tensor

from fastret.ops.checks import INTEGERS, check_count, check_labels

BUDGET = 1 << 22  # results looked at at once


def mean_average_precision_at_n(
    indices: Tensor, labels: Tensor, gallery_labels: Tensor | None = None, *, n: int | None = None
) -> float:
    """Mean over all queries of AP@n; formula at the top of this file.

    Cost: O(Q n). Memory: a fixed budget beyond the arguments.

    Args:
        indices: (Q, ranks) integers, for each query the gallery rows it found, best first, as ``topk`` and
            ``PQIndex.search`` return them; -1: none, which is not relevant.
        labels: (Q,) integers, of the queries.
        gallery_labels: (M,) integers; None: the queries searched themselves, row i being query i, which is then left
            out of its own ranking: search for n + 1.
        n: ranks that count; None: all there are.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in INTEGERS:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a tensor of integers, got {found}")
    if indices.ndim != 2 or 0 in indices.shape:
        raise ValueError(f"indices: expected (queries, ranks), at least one of each, got {tuple(indices.shape)}")
    check_labels(labels, indices, "labels")
    itself = gallery_labels is None
    rows = labels if gallery_labels is None else gallery_labels
    check_labels(rows, rows, "gallery_labels")
    if int(indices.min()) < -1 or int(indices.max()) >= len(rows):
        expected = f"-1 or rows of the gallery, 0 to {len(rows) - 1}" if len(rows) else "-1, the gallery is empty"
        raise ValueError(f"indices: expected {expected}, got {int(indices.min())} to {int(indices.max())}")
    check_count(n, "n")
    if len(rows) == 0:  # nothing to be found
        return 0.0
    number = torch.arange(len(indices), device=indices.device)
    block = max(1, BUDGET // indices.shape[1])
    sums = [
        _average_precision(found, label, rows, own if itself else None, n).sum()
        for found, label, own in zip(indices.split(block), labels.split(block), number.split(block), strict=True)
    ]
    return float(torch.stack(sums).sum()) / len(indices)


def _average_precision(found: Tensor, label: Tensor, rows: Tensor, own: Tensor | None, n: int | None) -> Tensor:
    """(queries,) AP@n in float64."""
    relevant = (rows[found.clamp(min=0).long()] == label[:, None]) & (found >= 0)
    counted = torch.ones_like(relevant) if own is None else found != own[:, None]
    rank = counted.cumsum(1)
    relevant &= counted
    if n is not None:
        relevant &= rank <= n
    hits = relevant.cumsum(1)
    precision = torch.where(relevant, hits.double() / rank.clamp(min=1), 0)
    return precision.sum(1) / hits[:, -1].clamp(min=1)
