"""Rows as the kernels take them, ``padded`` width apart with zeros between them; and what they return in parts."""

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, pack_rows

ALIGNMENT = 16  # rows are padded with zeros to a multiple of this many features, which vector loads need


def padded(width: int) -> int:
    """The width and its padding."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pack_padded(x: Tensor, order: Tensor, normalize: bool) -> PackedRows:
    """``x[order]`` (normalised) in the dtype of x."""
    packed = pack_rows(x, order, normalize, x.dtype)
    padding = padded(x.shape[1]) - x.shape[1]
    rows = torch.nn.functional.pad(packed.rows, (0, padding)) if padding else packed.rows
    return PackedRows(rows.contiguous()[:, : x.shape[1]], packed.order, packed.norms)


def total(parts: Tensor) -> Tensor:
    """Their sum along the first axis."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
