"""sampled_dot in C++ (csrc/cpu/sampled_dot.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import ArrayTuple, array, rows_of
from fastret.backends.rows import accumulation_dtype
from fastret.backends.sampling import Draws

# x, bank, first, index, seed, count, threads
_Problem = tuple[ArrayTuple, ArrayTuple, ArrayTuple | None, ArrayTuple | None, int, int, int]


def forward(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> Tensor:
    """(N, S) scores."""
    x, bank, first, index = _readable(x, bank, first, index)
    columns = (first is not None) + (0 if index is None else index.shape[1]) + (0 if draws is None else draws.count)
    scores = torch.empty(len(x), columns, dtype=accumulation_dtype(x.dtype))
    _C.sampled_dot_forward(*_problem(x, bank, first, index, draws), array(scores))
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
    x, bank, first, index = _readable(x, bank, first, index)
    grad = rows_of(grad)
    dx = torch.empty(x.shape, dtype=x.dtype) if need_x else None
    d_bank = torch.empty(bank.shape, dtype=accumulation_dtype(bank.dtype)) if need_bank else None
    gradients = (None if g is None else array(g) for g in (dx, d_bank))
    _C.sampled_dot_backward(*_problem(x, bank, first, index, draws), array(grad), *gradients)
    return dx, None if d_bank is None else d_bank.to(bank.dtype)


def _readable(
    x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    first = None if first is None else first.contiguous()
    return rows_of(x), rows_of(bank), first, None if index is None else rows_of(index)


def _problem(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> _Problem:
    seed, count = (0, 0) if draws is None else (int(draws.seed) % 2**64, draws.count)
    own, listed = (None if t is None else array(t) for t in (first, index))
    return array(x), array(bank), own, listed, seed, count, torch.get_num_threads()
