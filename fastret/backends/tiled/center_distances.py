"""center_distances for as many classes at a time as ``ELEMENTS`` numbers hold."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, accumulation_dtype, pack_rows

ELEMENTS = 1 << 18  # the few tensors of this size that a piece needs stay in a cache


def forward(w: Tensor, centers: int) -> Tensor:
    """(C,) sums, as backends/reference defines them."""
    result = torch.empty(w.shape[0] // centers, dtype=accumulation_dtype(w.dtype), device=w.device)
    for classes, _, packed in _pieces(w, centers):
        _, distances = _distances(packed, centers)
        result[classes] = distances.sum((1, 2)) / 2
    return result


def add_gradient(dw: Tensor, grad: Tensor, w: Tensor, centers: int) -> None:
    """Onto dw, the gradient of the rows from that of the sums: du_s = g sum over t of (u_s - u_t) / |u_s - u_t|."""
    wide = accumulation_dtype(w.dtype)
    for classes, rows, packed in _pieces(w, centers):
        u, distances = _distances(packed, centers)
        weight = distances.reciprocal().masked_fill_(distances == 0, 0).mul_(grad[classes, None, None])
        du = u * weight.sum(2, keepdim=True) - weight @ u
        dw[rows] += packed.gradient(du.flatten(0, 1), wide)


def _pieces(w: Tensor, centers: int) -> Iterator[tuple[slice, slice, PackedRows]]:
    count, d = w.shape
    step = max(1, ELEMENTS // (centers * max(centers, d)))
    for first in range(0, count // centers, step):
        classes = slice(first, min(count // centers, first + step))
        rows = slice(centers * classes.start, centers * classes.stop)
        yield classes, rows, pack_rows(w[rows], slice(None), normalize=True)


def _distances(packed: PackedRows, centers: int) -> tuple[Tensor, Tensor]:
    """Unit rows (c, K, D) and their distances (c, K, K), from differences: sqrt(2 - 2 cos) has no digits left where
    centres come close, which is what they are pulled to."""
    u = packed.rows.view(-1, centers, packed.rows.shape[1])
    return u, torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist")
