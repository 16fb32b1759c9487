"""center_distances for as many classes at a time as ``ELEMENTS`` numbers hold."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, accumulation_dtype, pack_rows

ELEMENTS = 1 << 20


def forward(w: Tensor, centers: int) -> Tensor:
    """(C,) sums, as backends/reference defines them."""
    result = torch.empty(w.shape[0] // centers, dtype=accumulation_dtype(w.dtype), device=w.device)
    for classes, _, packed in _pieces(w, centers):
        _, distances = _distances(packed, centers)
        result[classes] = distances.sum((1, 2)) / 2
    return result


def backward(grad: Tensor, w: Tensor, centers: int) -> Tensor:
    """Gradient of the rows from that of the sums: d/du_s = g sum over t of (u_s - u_t) / |u_s - u_t|."""
    result = torch.empty_like(w, memory_format=torch.contiguous_format)
    for classes, rows, packed in _pieces(w, centers):
        u, distances = _distances(packed, centers)
        weight = torch.where(distances == 0, 0, 1 / distances).mul_(grad[classes, None, None])
        du = u * weight.sum(2, keepdim=True) - weight @ u
        result[rows] = packed.gradient(du.flatten(0, 1), w.dtype)
    return result


def _pieces(w: Tensor, centers: int) -> Iterator[tuple[slice, slice, PackedRows]]:
    count, d = w.shape
    step = max(1, ELEMENTS // (centers * max(centers, d)))
    for first in range(0, count // centers, step):
        classes = slice(first, min(count // centers, first + step))
        rows = slice(centers * classes.start, centers * classes.stop)
        order = torch.arange(rows.stop - rows.start, device=w.device)
        yield classes, rows, pack_rows(w[rows], order, normalize=True)


def _distances(packed: PackedRows, centers: int) -> tuple[Tensor, Tensor]:
    """Unit rows (c, K, D) and their distances (c, K, K), from differences: sqrt(2 - 2 cos) has no digits left where
    centres come close, which is what they are pulled to."""
    u = packed.rows.view(-1, centers, packed.rows.shape[1])
    return u, torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist")
