"""segment_mean in C++ (csrc/cpu/segment_mean.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array, rows_of
from fastret.backends.rows import accumulation_dtype


def forward(x: Tensor, index: Tensor, segments: int, *, mean: bool) -> tuple[Tensor, Tensor]:
    """(S, D) means or sums, (S,) counts, as backends/reference defines them."""
    x, index = rows_of(x), index.contiguous()
    result = torch.empty(segments, x.shape[1], dtype=accumulation_dtype(x.dtype))
    counts = torch.empty(segments, dtype=torch.int64)
    _C.segment_mean_forward(array(x), array(index), mean, torch.get_num_threads(), array(result), array(counts))
    return result, counts


def backward(grad: Tensor, index: Tensor, counts: Tensor, *, mean: bool, dtype: torch.dtype) -> Tensor:
    """(N, D) gradient of the rows."""
    grad, index, counts = rows_of(grad), index.contiguous(), counts.contiguous()
    dx = torch.empty(len(index), grad.shape[1], dtype=dtype)
    _C.segment_mean_backward(array(grad), array(index), array(counts), mean, torch.get_num_threads(), array(dx))
    return dx
