"""sampled_dot in blocks of rows and of columns: no more than BUDGET elements of the bank are gathered at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.backends.sampling import Draws

BUDGET = 1 << 20  # elements of one temporary


@dataclass(frozen=True)
class _Block:
    rows: slice
    place: slice  # among the scores of a row
    columns: Tensor


def forward(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> Tensor:
    """(N, S) scores."""
    wide = accumulation_dtype(x.dtype)
    scores = torch.empty(len(x), _width(first, index, draws), dtype=wide, device=x.device)
    for block in _blocks(x, bank, first, index, draws):
        drawn = bank[block.columns].to(wide)
        scores[block.rows, block.place] = torch.einsum("nd,nsd->ns", x[block.rows].to(wide), drawn)
    return scores


def backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    first: Tensor | None,
    index: Tensor | None,
    draws: Draws | None,
    *,
    need_x: bool,
    need_bank: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbank) from the gradient of the scores."""
    wide = accumulation_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if need_x else None
    d_bank = torch.zeros(bank.shape, dtype=wide, device=x.device) if need_bank else None
    for block in _blocks(x, bank, first, index, draws):
        g = grad[block.rows, block.place].to(wide)
        if dx is not None:
            dx[block.rows] += torch.einsum("ns,nsd->nd", g, bank[block.columns].to(wide))
        if d_bank is not None:
            products = g[:, :, None] * x[block.rows, None].to(wide)
            d_bank.index_add_(0, block.columns.flatten(), products.flatten(0, 1))
    return None if dx is None else dx.to(x.dtype), None if d_bank is None else d_bank.to(bank.dtype)


def _width(first: Tensor | None, index: Tensor | None, draws: Draws | None) -> int:
    return (first is not None) + (0 if index is None else index.shape[1]) + (0 if draws is None else draws.count)


def _blocks(
    x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None
) -> Iterator[_Block]:
    n, width = x.shape
    start = 0 if first is None else 1
    count = _width(first, index, draws) - start
    across = max(1, min(count, BUDGET // width))
    down = max(1, BUDGET // (width * across))
    for begin in range(0, n, down):
        rows = slice(begin, min(n, begin + down))
        if first is not None:
            yield _Block(rows, slice(0, 1), first[rows, None])
        for left in range(0, count, across):
            right = min(count, left + across)
            if draws is not None:
                columns = draws.of_rows(begin).columns(rows.stop - begin, len(bank), left, right)
            else:
                assert index is not None
                columns = index[rows, left:right]
            yield _Block(rows, slice(start + left, start + right), columns)
