"""Functions phi(z) of a logit that a head may sum over its pairs instead of taking their log-sum-exp.

    log1m_exp         log(1 - e^z), z <= 0        slope -1 / (e^-z - 1)
    hinge             max(0, z)                   slope [z > 0]
    distance          sqrt(-z), z <= 0            slope -1 / (2 sqrt(-z))
    inverse_distance  1 / sqrt(-z), z <= 0        slope 1 / (2 (-z)^1.5)

Where an argument must not be positive and rounding made it so, or it is closer to 0 than ``resolution``, these rules
hold, and finite input never gives infinity:

- log1m_exp takes z = -resolution, value and slope: a pair whose probability rounds to 1 is pushed away hardest;
- rows that coincide have no direction: slope 0; distance is 0, inverse_distance what it is at -resolution.
"""

import torch
from torch import Tensor

NAMES = ("log1m_exp", "hinge", "distance", "inverse_distance")


def resolution(phi: str, dtype: torch.dtype) -> float:
    """Magnitudes of z below this count as 0: an ulp of 1; of a squared distance 32, as 2 - 2 cosine of equal rows comes
    out as a few, and the slope there would be noise."""
    return torch.finfo(dtype).eps * (1 if phi == "log1m_exp" else 32)


def value(phi: str, z: Tensor) -> Tensor:
    """phi(z), elementwise; differentiable by autograd, twice, with the slopes above."""
    if phi == "hinge":
        return torch.relu(z)  # whose slope at 0 is 0, that of clamp_min is 1
    floor = resolution(phi, z.dtype)
    gap = -z
    near = gap.detach() < floor
    if phi == "log1m_exp":
        gap = torch.where(near, floor + (gap - gap.detach()), gap)  # at the floor, with a slope
        # each form where the other cancels
        return torch.where(gap < 0.7, torch.log(-torch.expm1(-gap)), torch.log1p(-torch.exp(-gap)))
    safe = torch.where(near, floor, gap)
    root = safe.sqrt()
    return torch.where(near, 0, root) if phi == "distance" else 1 / root


def slope(phi: str, z: Tensor) -> Tensor:
    """d phi / dz, elementwise."""
    if phi == "hinge":
        return (z > 0).to(z.dtype)
    floor = resolution(phi, z.dtype)
    gap = -z
    if phi == "log1m_exp":
        return -1 / torch.expm1(gap.clamp_min(floor))
    near = gap < floor
    safe = torch.where(near, floor, gap)
    result = -0.5 / safe.sqrt() if phi == "distance" else 0.5 / (safe * safe.sqrt())
    return torch.where(near, 0, result)
