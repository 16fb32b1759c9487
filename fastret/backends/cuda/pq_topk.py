"""pq_topk in CUDA C++ (csrc/cuda/pq_topk.cu)."""

import torch
from torch import Tensor

from fastret.backends import cuda
from fastret.backends.cuda.launch import array, call, on, rows_of
from fastret.backends.registry import Call

_METRICS = ("l2", "l21", "dot")  # in the order of csrc/cuda/pq_topk.h


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if call.dtype == torch.float64:
        return "the CUDA kernel of pq_topk takes no float64"
    return "the CUDA kernel of pq_topk finds at most 2,048" if "long" in call.options else None


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
    device, (books, count, width) = query.device, codebook.shape
    rows, words = rows_of(query), rows_of(codebook.reshape(-1, width))
    # the scan reads 8 bits where those number all words
    as_they_lie = codes.dtype == torch.uint16 or (codes.dtype == torch.uint8 and count <= 1 << 8)
    narrow = rows_of(codes if as_they_lie else codes.to(torch.uint16))
    half = table_dtype == torch.float16
    with on(device):
        _, parts, table_rows = cuda.extension().pq_topk_plan(len(query), len(codes), books, count, k, half)
    lists = torch.empty(len(query) * parts, k, dtype=torch.int64, device=device) if parts > 1 else None
    tables = torch.empty(table_rows, books * count, device=device, dtype=table_dtype) if table_rows else None
    scores = torch.empty(len(query), k, dtype=torch.float32, device=device)
    indices = torch.empty(len(query), k, dtype=torch.int64, device=device)
    call(
        "pq_topk",
        device,
        array(rows, "query"),
        array(words, "codebook"),
        array(narrow, "codes"),
        count,
        k,
        _METRICS.index(metric),
        first_index,
        half,
        None if lists is None else array(lists, "lists"),
        None if tables is None else array(tables, "tables"),
        array(scores, "scores"),
        array(indices, "indices"),
    )
    return scores, indices
