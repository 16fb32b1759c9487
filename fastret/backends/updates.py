"""Rows of a bank moved in place by PyTorch's own operators, for the implementations that differ in how they average."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastret.backends.rows import row_norms

Means = Callable[[Tensor, Tensor, int], Tensor]


def update(
    bank: Tensor,
    index: Tensor,
    x: Tensor,
    momentum: float,
    convention: str,
    *,
    normalize: bool,
    duplicates: str,
    means: Means,
) -> None:
    """As the top of fastret/ops/update_rows.py has it; ``means(rows, segment, count)``: of the rows of each segment."""
    kept, taken = (momentum, 1 - momentum) if convention == "old" else (1 - momentum, momentum)
    rows = kept * bank[index].to(x.dtype) + taken * _one_of_each(index, x, duplicates, means)
    if normalize:
        rows = rows / row_norms(rows)
    bank[index] = rows.to(bank.dtype)  # those of one index are equal, whichever is written last


def _one_of_each(index: Tensor, x: Tensor, duplicates: str, means: Means) -> Tensor:
    """(B, D): for each place the row that stands for all that have its index."""
    ascending, order = index.sort(stable=True)
    begin = torch.searchsorted(ascending, index)
    end = torch.searchsorted(ascending, index, right=True)
    if duplicates == "last":
        return x[order[end - 1]]
    if duplicates == "first":
        return x[order[begin]]
    return means(x, begin, len(x))[begin]
