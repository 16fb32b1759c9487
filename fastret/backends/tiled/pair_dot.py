"""pair_dot in chunks of pairs: the rows gathered at once are bounded by a fixed budget."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, accumulation_dtype, pack_rows

BUDGET = 1 << 20  # elements of one temporary


def _chunks(pairs: int, width: int) -> Iterator[slice]:
    size = max(1, BUDGET // max(1, width))
    return (slice(begin, begin + size) for begin in range(0, pairs, size))


def _packed(x: Tensor, y: Tensor | None, normalize: bool) -> tuple[PackedRows, PackedRows]:
    u = pack_rows(x, torch.arange(len(x), device=x.device), normalize)
    return u, u if y is None else pack_rows(y, torch.arange(len(y), device=y.device), normalize)


def forward(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, *, normalize: bool) -> Tensor:
    """(P,) scores."""
    u, v = _packed(x, y, normalize)
    scores = torch.empty(len(row), dtype=accumulation_dtype(x.dtype), device=x.device)
    for chunk in _chunks(len(row), x.shape[1]):
        scores[chunk] = (u.rows[row[chunk]] * v.rows[column[chunk]]).sum(1)
    return scores


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    row: Tensor,
    column: Tensor,
    *,
    normalize: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y from those of the scores (P,)."""
    u, v = _packed(x, y, normalize)
    du = torch.zeros_like(u.rows)
    dv = du if y is None else torch.zeros_like(v.rows)
    for chunk in _chunks(len(row), x.shape[1]):
        i, j, g = row[chunk], column[chunk], grad[chunk, None]
        if need_x:
            du.index_add_(0, i, g * v.rows[j])
        if need_y or y is None:
            dv.index_add_(0, j, g * u.rows[i])
    return (
        u.gradient(du, x.dtype) if need_x else None,
        v.gradient(dv, y.dtype) if y is not None and need_y else None,
    )
