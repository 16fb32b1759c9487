"""topk in C++ (csrc/cpu/topk.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array, rows_of
from fastret.backends.cpu.masked_lse import mask_tuple
from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype

_METRICS = ("cosine", "dot", "l2")  # in the order of csrc/cpu/topk.h


def forward(x: Tensor, y: Tensor, k: int, mask: PairMask, *, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first, as backends/reference defines them."""
    rows, others = rows_of(x), rows_of(y)
    scores = torch.empty(len(x), k, dtype=accumulation_dtype(x.dtype))
    indices = torch.empty(len(x), k, dtype=torch.int64)
    _C.topk(
        array(rows),
        array(others),
        k,
        mask_tuple(mask),
        _METRICS.index(metric),
        first_column,
        torch.get_num_threads(),
        array(scores),
        array(indices),
    )
    return scores, indices
