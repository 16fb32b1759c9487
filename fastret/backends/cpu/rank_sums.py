"""rank_sums in C++ (csrc/cpu/rank_sums.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import ArrayTuple, array, rows_of
from fastret.backends.rows import accumulation_dtype
from fastret.backends.segments import Segments

Problem = tuple[ArrayTuple, ArrayTuple | None, ArrayTuple, ArrayTuple, ArrayTuple, bool, bool, float, int]


def _problem(
    x: Tensor, y: Tensor | None, s: Segments, temperature: float, exclude_self: bool, normalize: bool
) -> Problem:
    """The arguments both directions share; the tensors must outlive the call."""
    order, start, count = array(s.order), array(s.start), array(s.count)
    gallery = None if y is None else array(y)
    return array(x), gallery, order, start, count, exclude_self, normalize, temperature, torch.get_num_threads()


def forward(
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    pairs: int,
    *,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """rank_all, rank_pos (P,) as backends/reference defines them."""
    x, y = rows_of(x), None if y is None else rows_of(y)
    rank_all = torch.empty(pairs, dtype=accumulation_dtype(x.dtype))
    rank_pos = torch.empty_like(rank_all)
    problem = _problem(x, y, segments, temperature, exclude_self, normalize)
    _C.rank_sums_forward(*problem, array(rank_all), array(rank_pos))
    return rank_all, rank_pos


def backward(
    grad_all: Tensor,
    grad_pos: Tensor,
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    *,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y from those of rank_all and rank_pos (P,)."""
    x, y = rows_of(x), None if y is None else rows_of(y)
    grad_all, grad_pos = grad_all.contiguous(), grad_pos.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype) if need_x else None
    dy = torch.empty(y.shape, dtype=y.dtype) if y is not None and need_y else None
    problem = _problem(x, y, segments, temperature, exclude_self, normalize)
    outputs = [None if g is None else array(g) for g in (dx, dy)]
    _C.rank_sums_backward(*problem, array(grad_all), array(grad_pos), *outputs)
    return dx, dy
