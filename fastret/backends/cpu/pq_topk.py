"""pq_topk in C++ (csrc/cpu/pq_topk.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array, rows_of

_METRICS = ("l2", "l21", "dot")  # in the order of csrc/cpu/pq_topk.h


def forward(
    query: Tensor,
    codebook: Tensor,
    codes: Tensor,
    k: int,
    *,
    metric: str,
    first_index: int,
    table_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first, as backends/reference defines them."""
    rows, words = rows_of(query), rows_of(codebook.reshape(-1, codebook.shape[2]))
    # the scan reads 8 bits where those number all words
    as_they_lie = codes.dtype == torch.uint16 or (codes.dtype == torch.uint8 and codebook.shape[1] <= 1 << 8)
    narrow = rows_of(codes if as_they_lie else codes.to(torch.uint16))
    scores = torch.empty(len(query), k, dtype=query.dtype)
    indices = torch.empty(len(query), k, dtype=torch.int64)
    _C.pq_topk(
        array(rows),
        array(words),
        array(narrow),
        codebook.shape[1],
        k,
        _METRICS.index(metric),
        first_index,
        table_dtype == torch.float16,
        torch.get_num_threads(),
        array(scores),
        array(indices),
    )
    return scores, indices
