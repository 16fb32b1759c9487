"""pair_dot in C++ (csrc/cpu/pair_dot.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array, rows_of
from fastret.backends.rows import accumulation_dtype


def forward(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, *, normalize: bool) -> Tensor:
    """(P,) scores."""
    x, y, row, column = rows_of(x), None if y is None else rows_of(y), row.contiguous(), column.contiguous()
    scores = torch.empty(len(row), dtype=accumulation_dtype(x.dtype))
    others = None if y is None else array(y)
    threads = torch.get_num_threads()
    _C.pair_dot_forward(array(x), others, array(row), array(column), normalize, threads, array(scores))
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
    x, y, row, column = rows_of(x), None if y is None else rows_of(y), row.contiguous(), column.contiguous()
    grad = grad.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype) if need_x else None
    dy = torch.empty(y.shape, dtype=y.dtype) if y is not None and need_y else None
    problem = (array(x), None if y is None else array(y), array(row), array(column), normalize, torch.get_num_threads())
    _C.pair_dot_backward(*problem, array(grad), *(None if g is None else array(g) for g in (dx, dy)))
    return dx, dy
