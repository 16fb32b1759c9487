"""segment_mean as it is defined: every row beside every segment."""

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype


def segment_mean(x: Tensor, index: Tensor, segments: int, *, mean: bool) -> tuple[Tensor, Tensor]:
    """(S, D) means or sums, (S,) counts. Differentiable by autograd, twice."""
    members = index == torch.arange(segments, device=index.device)[:, None]
    counts = members.sum(1)
    result = torch.where(members[:, :, None], x.to(torch.float64), 0).sum(1)
    if mean:
        result = result / counts.clamp_min(1)[:, None]
    return result.to(accumulation_dtype(x.dtype)), counts
