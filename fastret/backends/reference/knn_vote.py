"""The vote of nearest neighbours as it is defined: every neighbour's class spelled out."""

import torch
from torch import Tensor

from fastret.backends.selection import best


def forward(
    scores: Tensor, indices: Tensor, place: Tensor, classes: int, *, scale: float, top: int
) -> tuple[Tensor, Tensor]:
    """(winners, shares), both (Q, top)."""
    there = indices >= 0
    weight = torch.where(there, ((scores - scores[:, :1]) * scale).exp(), 0)
    voters = torch.full_like(indices, -1)
    voters[there] = place[indices[there]]
    wide = max(top, classes)
    votes = (weight[:, :, None] * (voters[:, :, None] == torch.arange(wide, device=place.device))).sum(1)
    return winners(votes, top)


def winners(votes: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """From the (Q, C >= top) votes of every class: the classes with most, -1 where none is left, and their shares."""
    shares = votes / votes.sum(1, keepdim=True).clamp_min(torch.finfo(votes.dtype).tiny)
    first = best(shares, top)
    shares = shares.gather(1, first)
    return torch.where(shares > 0, first, -1), shares
