"""center_distances as it is defined: all differences at once."""

import torch
from torch import Tensor

from fastret.backends.rows import unit_rows


def center_distances(w: Tensor, centers: int) -> Tensor:
    """(C,) sums over the pairs of each ``centers`` consecutive rows. Differentiable by autograd."""
    u = unit_rows(w).view(w.shape[0] // centers, centers, w.shape[1])
    first, second = torch.triu_indices(centers, centers, 1, device=w.device)
    # its gradient where rows coincide is 0
    distances: Tensor = torch.linalg.vector_norm(u[:, first] - u[:, second], dim=2)
    return distances.sum(1)
