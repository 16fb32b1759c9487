"""The vote of nearest neighbours in PyTorch: a table of classes for each query of the caller's block."""

import torch
from torch import Tensor

from fastret.backends.reference.knn_vote import winners


def forward(
    scores: Tensor, indices: Tensor, place: Tensor, classes: int, *, scale: float, top: int
) -> tuple[Tensor, Tensor]:
    """(winners, shares), both (Q, top), as backends/reference defines them."""
    weight = ((scores - scores[:, :1]) * scale).exp()
    weight = torch.where(indices >= 0, weight, 0)
    voters = place[indices.clamp_min(0)] if len(place) else torch.zeros_like(indices)
    columns = max(top, classes)
    flat = voters + columns * torch.arange(len(voters), device=voters.device)[:, None]
    votes = weight.new_zeros(len(voters) * columns)
    votes = votes.scatter_add_(0, flat.flatten(), weight.flatten()).view(len(voters), columns)
    return winners(votes, top)
