"""Exact nearest neighbours, a block of queries at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastret import ops
from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.backends.rows import poison
from fastret.ops import checks
from fastret.ops.heads import check_heads

if TYPE_CHECKING:
    from tqdm import tqdm

# Products of one call, where rows allow: a bar that moves, and still many rows for the kernels.
_PRODUCTS = 1 << 34
_LEAST_ROWS = 1024

# Results of a block that are worked on at once, where only something smaller is kept of them.
BUDGET = 1 << 21

_PATIENCE = 3  # seconds without a bar


def topk(
    query: Tensor,
    gallery: Tensor | None,
    k: int,
    *,
    metric: str = "cosine",
    mask: PairMask | None = None,
    first_index: int = 0,
    progress: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows of every query, exactly: ``fastret.ops.topk`` says how they are ranked.

    Of equal scores the lower index comes first. Where there are fewer than k candidates the rest has index -1 and score
    -inf (l2: +inf). Results carry no gradient: ``fastret.ops.pair_dot`` scores found pairs differentiably.

    Cost: one N x M matmul and a comparison a score. Memory: the results, O(N k); the gallery is read where it lies, in
    its own dtype.

    Args:
        query: (N, D) rows, floating point.
        gallery: (M, D) rows to search; None: the queries themselves, each left out of its own result.
        k: neighbours a query, at least 1; may be more than there are.
        metric: "cosine" or "dot", the greatest first; "l2", squared distances, the least first.
        mask: which pairs are candidates, ``fastret.ops.PairMask(different=(query labels, gallery labels))`` for
            example, with ``distinct=`` for a second relation such as cameras; None: all.
        first_index: the gallery is a piece of a larger one, its first row has this index there.
        progress: a bar where it takes more than a few seconds.
        impl: as in ``fastret.ops.topk``.

    Returns:
        (scores, indices), both (N, k): float32, or float64 where the rows are; int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(query, "query")
    if gallery is not None:
        checks.check_rows(gallery, "gallery", like=query)
    if gallery is None:
        gallery = query
        left_out = PairMask(offset=first_index)
        mask = left_out if mask is None else mask & left_out
    mask = PairMask() if mask is None else mask
    check_heads([Head(mask=mask)], query, gallery.shape[0])  # before it is cut to the rows of a block
    found = [
        ops.topk(
            query[block],
            gallery,
            k=k,
            metric=metric,
            mask=mask.of_rows(block.start, block.stop),
            first_column=first_index,
            impl=impl,
        )
        for block in blocks(len(query), rows_at_once(gallery), progress)
    ]
    return found[0] if len(found) == 1 else (torch.cat([s for s, _ in found]), torch.cat([i for _, i in found]))


def rows_at_once(gallery: Tensor) -> int:
    """Queries of one call."""
    return max(_LEAST_ROWS, _PRODUCTS // max(1, gallery.numel()))


def bar(total: int, what: str, unit: str, shown: bool) -> "tqdm[int]":
    """A bar for a person who has waited a little already."""
    from tqdm import tqdm

    hidden = None if shown else True  # None: where nobody looks
    return tqdm(total=total, desc=what, unit=unit, delay=_PATIENCE, leave=False, disable=hidden)


def serving(op: str, x: Tensor) -> str:
    """The implementation that is asked for; "auto" where that is one for training, which has no such op."""
    name = registry.chosen(None)
    if name == registry.AUTO:
        return name
    call = registry.Call(op, x.device.type, x.dtype, index=x.device.index)
    return registry.AUTO if registry.IMPLEMENTATIONS[name].unsupported(call) else name


def check_finite(x: Tensor, name: str) -> None:
    """NaN has no place in a ranking, and would be counted as a miss or a hit depending on the sort."""
    if bool(poison(x).isnan()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def blocks(queries: int, rows: int, progress: bool) -> Iterator[slice]:
    """[0, queries) in blocks, at least one, and a bar of them where they take long."""
    with bar(queries, "search", "query", progress) as shown:
        for begin in range(0, max(1, queries), rows):
            block = slice(begin, min(queries, begin + rows))
            yield block
            shown.update(block.stop - block.start)
