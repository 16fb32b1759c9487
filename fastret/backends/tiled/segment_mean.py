"""segment_mean by a stable sort of the rows and PyTorch's reduction of consecutive ones, some features at a time."""

import torch
from torch import Tensor

from fastret.backends.registry import Call
from fastret.backends.rows import accumulation_dtype

BUDGET = 1 << 20  # elements of one temporary
_LEAST_FEATURES = 16  # of all rows at a time: what is kept of a row stays a few numbers


def unsupported(call: Call) -> str | None:
    """PyTorch reduces consecutive rows, without atomics, on these alone."""
    if call.device not in ("cpu", "cuda"):
        return f"PyTorch has no segment_reduce on {call.device}; impl='reference' serves"
    return None


def forward(x: Tensor, index: Tensor, segments: int, *, mean: bool) -> tuple[Tensor, Tensor]:
    """(S, D) means or sums, (S,) counts, as backends/reference defines them."""
    # rows that belong nowhere: a segment behind the others
    ordered, order = torch.where(index < 0, segments, index).sort(stable=True)
    start = torch.searchsorted(ordered, torch.arange(segments + 1, device=index.device))
    counts = start.diff()
    lengths = torch.cat([counts, (len(index) - start[-1:])])
    result = torch.empty(segments, x.shape[1], dtype=accumulation_dtype(x.dtype), device=x.device)
    step = max(_LEAST_FEATURES, BUDGET // max(1, len(index)))
    for first in range(0, x.shape[1], step):
        rows = x[:, first : first + step][order].double()
        sums = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)[:segments]
        result[:, first : first + step] = sums / counts.clamp_min(1)[:, None] if mean else sums
    return result, counts


def backward(grad: Tensor, index: Tensor, counts: Tensor, *, mean: bool, dtype: torch.dtype) -> Tensor:
    """(N, D) gradient of the rows."""
    dx = torch.zeros(len(index), grad.shape[1], dtype=dtype, device=grad.device)
    if not len(counts):
        return dx
    step = max(1, BUDGET // grad.shape[1])
    for first in range(0, len(index), step):
        segment = index[first : first + step]
        place = segment.clamp_min(0)
        rows = grad[place] / counts[place, None] if mean else grad[place]
        dx[first : first + step] = torch.where((segment >= 0)[:, None], rows, 0)
    return dx
