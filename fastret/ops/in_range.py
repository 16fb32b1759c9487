"""in_range: an index that is looked at where it is used, in a compiled graph too, which no check outside of one is."""

import torch
from torch import Tensor

from fastret.ops import checks
from fastret.ops.library import define


def in_range(index: Tensor, size: int, name: str) -> Tensor:
    """The index in int64, once every value of it is known to be in [0, size).

    Raises:
        ValueError: naming the argument and a value that is not; a device other than the CPU asserts.
    """
    checked: Tensor = torch.ops.fastret.in_range.default(index, size, name)
    return checked


def _in_range(index: Tensor, size: int, name: str) -> Tensor:
    wide = index.to(torch.int64, copy=True)  # an operator returns nothing that it was given
    checks.check_range(wide, size, name)
    return wide


def _in_range_fake(index: Tensor, size: int, name: str) -> Tensor:
    return torch.empty_like(index, dtype=torch.int64)


define("in_range(Tensor index, SymInt size, str name) -> Tensor", _in_range, _in_range_fake)
