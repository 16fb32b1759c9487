"""Rows as the kernels take them, ``padded`` width apart with zeros between them; and what they return in parts."""

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, pack_rows

ALIGNMENT = 16  # rows are padded with zeros to a multiple of this many features, which vector loads need


def padded(width: int) -> int:
    """The width and its padding."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pack_padded(x: Tensor, order: Tensor | slice, normalize: bool) -> PackedRows:
    """``x[order]`` (normalised) in the dtype of x; always a copy, whose alignment is not that of x."""
    packed = pack_rows(x, order, normalize, x.dtype)
    padding = padded(x.shape[1]) - x.shape[1]
    rows = torch.nn.functional.pad(packed.rows, (0, padding)) if padding else packed.rows
    if rows.data_ptr() == x.data_ptr():
        rows = rows.clone(memory_format=torch.contiguous_format)
    return PackedRows(rows.contiguous()[:, : x.shape[1]], packed.order, packed.norms)


def merging(result: Tensor, parts: int, blocks: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Room for two results (n,) in parts, and a zero for each block of rows, where the programs of a block count which
    of them merges its parts; nothing where there is one part.

    Zeros are new for each launch: one on another stream counts in its own, and a captured graph clears them.
    """
    if parts == 1:
        return None, None
    table = torch.empty(parts, 2, len(result), dtype=result.dtype, device=result.device)
    return table, torch.zeros(blocks, dtype=torch.int32, device=result.device)


def total(parts: Tensor) -> Tensor:
    """Their sum along the first axis."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
