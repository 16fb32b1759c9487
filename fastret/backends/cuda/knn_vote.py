"""The vote of nearest neighbours in CUDA C++ (csrc/cuda/knn_vote.cu)."""

import torch
from torch import Tensor

from fastret.backends.cuda.launch import array, call, rows_of
from fastret.backends.registry import Call


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    return "the CUDA kernel of knn_vote takes no float64" if call.dtype == torch.float64 else None


def forward(
    scores: Tensor, indices: Tensor, place: Tensor, classes: int, *, scale: float, top: int
) -> tuple[Tensor, Tensor]:
    """(winners, shares), both (Q, top), as backends/reference defines them."""
    scores, indices, place = rows_of(scores.float()), rows_of(indices), place.contiguous()
    winners = torch.empty(len(scores), top, dtype=torch.int64, device=scores.device)
    shares = torch.empty(len(scores), top, dtype=torch.float32, device=scores.device)
    given = (array(scores, "scores"), array(indices, "indices"), array(place, "place"))
    call("knn_vote", scores.device, *given, classes, scale, array(winners, "winners"), array(shares, "shares"))
    return winners, shares
