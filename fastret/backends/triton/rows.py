"""Rows as the kernels take them, ``padded`` width apart with zeros between them, and gradients back, by the kernels of
kernels/triton/rows.py; and what kernels return in parts."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.kernels.triton import config
from fastret.kernels.triton import rows as kernels

ALIGNMENT = 16  # rows are padded with zeros to a multiple of this many features, which vector loads need


def padded(width: int) -> int:
    """The width and its padding."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def nothing_yet(x: Tensor) -> Tensor:
    """0, 0-dim, in the dtype of accumulation; packing makes it NaN where rows hold NaN or infinity, which a bounded
    function of the scores would hide."""
    return torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device)


@dataclass(frozen=True)
class PackedRows:
    """Rows sorted by ``order``, or in their own, None, and, where asked, divided by ``norms`` (n,).

    Attributes:
        rows: (n, D), ``padded`` width apart.
        raw: they are not divided by their norms: kernels do that with their scores.
    """

    rows: Tensor
    order: Tensor | None
    norms: Tensor | None
    raw: bool = False

    def gradient(
        self, du: Tensor, dtype: torch.dtype, *, nothing: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """Gradient of the caller's rows from that of the packed ones, (I - u u^T) du / norm, unsorted.

        Where the result can take the place of du, it does.

        Args:
            du: (n, D), or (parts, n, D) to be summed, in the dtype of accumulation; of raw rows divided by the norms.
            nothing: 0-dim, is added to it.
            onto: (n, at least D), to which it is added; ``dtype`` is that of it.
        """
        parts, n, width = du.shape if du.dim() == 3 else (1, *du.shape)
        du = du if du.stride(-1) == 1 and (parts == 1 or du.stride(0) == n * du.stride(1)) else du.contiguous()
        dx = du if parts == 1 else None
        if onto is not None:
            dx = onto
        elif dx is None or self.order is not None or du.dtype != dtype or du.numel() != n * du.stride(-2):
            dx = torch.empty(n, width, dtype=dtype, device=du.device)
        if n:
            blocks, options = _tiles("unpack", self.rows, width)
            kernels.unpack_kernel[(blocks,)](
                *(du, self.rows, self.norms, self.order, nothing, dx, n, parts),
                *(du.stride(-2), self.rows.stride(0), dx.stride(-2)),
                RAW=self.raw,
                ADD=onto is not None,
                WIDTH=width,
                **options,
            )
        return dx.view(n, width) if onto is None else dx


def pack_padded(x: Tensor, order: Tensor | slice | None, normalize: bool, nothing: Tensor | None = None) -> PackedRows:
    """``x[order]`` (normalised) in the dtype of x; always a copy, whose alignment is not that of x.

    Args:
        order: None, or slice(None): as they are.
        nothing: ``nothing_yet``, to be made NaN.
    """
    n, width = x.shape
    order = None if isinstance(order, slice) else order
    rows = torch.empty(n, padded(width), dtype=x.dtype, device=x.device)
    norms = torch.empty(n, dtype=accumulation_dtype(x.dtype), device=x.device) if normalize else None
    _pack(x, order, rows, norms, nothing)
    return PackedRows(rows[:, :width], order, norms)


def lies_packed(x: Tensor) -> bool:
    """Whether rows lie in memory as packed ones do."""
    width = x.shape[1]
    return x.stride() == (width, 1) and width % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0


def in_place(x: Tensor, normalize: bool, nothing: Tensor | None = None) -> PackedRows:
    """x that ``lies_packed``, with its norms where it is to be normalised; it is not copied."""
    norms = torch.empty(len(x), dtype=accumulation_dtype(x.dtype), device=x.device) if normalize else None
    _pack(x, None, None, norms, nothing)
    return PackedRows(x, None, norms, raw=normalize)


def look(x: Tensor, nothing: Tensor) -> None:
    """Makes ``nothing`` NaN where x holds NaN or infinity."""
    _pack(x, None, None, None, nothing)


def _pack(x: Tensor, order: Tensor | None, rows: Tensor | None, norms: Tensor | None, nothing: Tensor | None) -> None:
    n, width = x.shape
    if n:
        blocks, options = _tiles("pack", x, padded(width))
        kernels.pack_kernel[(blocks,)](
            *(x, order, rows, norms, nothing, n, *x.stride()), WIDTH=width, PADDED=padded(width), **options
        )


def _tiles(kind: str, rows: Tensor, width: int) -> tuple[int, config.Options]:
    """How many programs share rows of a width, and their tiles: the same of any strides."""
    options = dict(config.lookup(kind, rows.device, rows.dtype))
    features = min(options["BLOCK_D"], max(ALIGNMENT, triton.next_power_of_2(width)))
    most = options["BLOCK_R"] * options["BLOCK_D"] // features
    share = min(most, triton.next_power_of_2(triton.cdiv(len(rows), config.processors(rows.device))))
    return triton.cdiv(len(rows), share), {**options, "BLOCK_R": share, "BLOCK_D": features}


def merging(result: Tensor, parts: int, blocks: int, heads: int = 1) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Room for two results (n,) of each head in parts, and a zero for each block of rows, where the programs of a
    block count which of them merges its parts; nothing where there is one part.

    Zeros are new for each launch: one on another stream counts in its own, and a captured graph clears them.
    """
    if parts == 1:
        return None, None
    table = torch.empty(parts, 2, heads * len(result), dtype=result.dtype, device=result.device)
    return table, torch.zeros(blocks, dtype=torch.int32, device=result.device)


def total(parts: Tensor) -> Tensor:
    """Their sum along the first axis."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
