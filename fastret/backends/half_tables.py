"""Lookup tables in float16: a query's entries times a power of two of its own, which rounds nothing, then rounded."""

import math

import torch
from torch import Tensor

REACH = 15  # the greatest entry of a table lies in [2^14, 2^15): float16 ends at 2^16, and is exact down to 2^-14


def power(greatest: Tensor) -> Tensor:
    """2^e for tables whose greatest finite magnitudes these are: entries over it are rounded, sums multiplied by it.

    Both 2^e and 2^-e are normal numbers. Where e would be less, float32 has no bits that float16 would lose.
    """
    least = math.frexp(torch.finfo(greatest.dtype).smallest_normal)[1] - 1
    exponent = torch.frexp(greatest).exponent - REACH
    return torch.ldexp(torch.ones_like(greatest), exponent.clamp_min(least))


def rounded(tables: Tensor, power: Tensor) -> Tensor:
    """The numbers that float16 tables hold, in the dtype of the tables."""
    return (tables / power).half().to(tables.dtype)


def greatest(tables: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Over these axes; what is not finite has no part in it, and stays what it is in a table."""
    return torch.where(tables.isfinite(), tables.abs(), 0).amax(dim)
