"""Functions phi(z) of a logit that a head may sum over its pairs instead of taking their log-sum-exp.

    log1m_exp         log(1 - e^z), z <= 0        slope -1 / (e^-z - 1)
    hinge             max(0, z)                   slope [z > 0]
    distance          sqrt(-z), z <= 0            slope -1 / (2 sqrt(-z))
    inverse_distance  1 / sqrt(-z), z <= 0        slope 1 / (2 (-z)^1.5)

Where an argument must not be positive and rounding made it so, or it is closer to 0 than ``smallest`` (the resolution
of the dtype: nothing nearer can be told from 0), these rules hold, and finite input never gives infinity:

- log1m_exp takes z = -smallest, value and slope: a pair whose probability rounds to 1 is pushed away hardest;
- rows that coincide have no direction: slope 0; distance is 0, inverse_distance what it is at -smallest.
"""

import torch
from torch import Tensor

NAMES = ("log1m_exp", "hinge", "distance", "inverse_distance")


def smallest(dtype: torch.dtype) -> float:
    """Magnitudes of z below this count as 0."""
    return torch.finfo(dtype).eps


def value(phi: str, z: Tensor) -> Tensor:
    """phi(z), elementwise; differentiable by autograd, twice, with the slopes above."""
    floor = smallest(z.dtype)
    if phi == "hinge":
        return z.clamp_min(0)
    gap = -z
    near = gap.detach() < floor
    if phi == "log1m_exp":
        gap = gap + torch.where(near, floor - gap.detach(), 0)  # at the floor, with a slope
        # each form where the other cancels
        return torch.where(gap < 0.7, torch.log(-torch.expm1(-gap)), torch.log1p(-torch.exp(-gap)))
    safe = torch.where(near, floor, gap)
    root = safe.sqrt()
    return torch.where(near, 0, root) if phi == "distance" else 1 / root


def slope(phi: str, z: Tensor) -> Tensor:
    """d phi / dz, elementwise."""
    if phi == "hinge":
        return (z > 0).to(z.dtype)
    floor = smallest(z.dtype)
    gap = -z
    if phi == "log1m_exp":
        return -1 / torch.expm1(gap.clamp_min(floor))
    near = gap < floor
    safe = torch.where(near, floor, gap)
    result = -0.5 / safe.sqrt() if phi == "distance" else 0.5 / (safe * safe.sqrt())
    return torch.where(near, 0, result)
