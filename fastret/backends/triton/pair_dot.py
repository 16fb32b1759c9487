"""pair_dot by the kernels of kernels/triton/pair_dot.py. Backward sorts the list, by a stable sort, for each side.

Nothing here waits for the device. Memory beyond inputs and outputs: rows in their own dtype, their gradients in the
dtype of accumulation, a few numbers a pair; never the rows of all pairs.
"""

import torch
import triton
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton.rows import PackedRows, pack_padded, padded
from fastret.kernels.triton import config
from fastret.kernels.triton import pair_dot as kernels


def _packed(x: Tensor, y: Tensor | None, normalize: bool) -> tuple[PackedRows, PackedRows]:
    u = pack_padded(x, None, normalize)
    return u, u if y is None else pack_padded(y, None, normalize)


def forward(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, *, normalize: bool) -> Tensor:
    """(P,) scores."""
    with torch.cuda.device_of(x):
        scores = torch.empty(len(row), dtype=accumulation_dtype(x.dtype), device=x.device)
        if len(row):
            u, v = _packed(x, y, normalize)
            options = config.lookup("pair scores", x.device, x.dtype)
            kernels.pair_scores_kernel[(triton.cdiv(len(row), options["BLOCK_P"]),)](
                *(u.rows, v.rows, row.contiguous(), column.contiguous(), scores, len(row), padded(x.shape[1])),
                **options,
            )
        return scores


def _row_gradient(
    u: PackedRows, v: PackedRows, row: Tensor, partner: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the caller's rows from pairs with packed rows v."""
    n, width = u.rows.shape
    ordered, order = torch.sort(row, stable=True)
    start = torch.searchsorted(ordered, torch.arange(n + 1, device=row.device))
    du = torch.empty(n, padded(width), dtype=grad.dtype, device=row.device)
    if n:
        options = config.lookup("pair gradient", row.device, u.rows.dtype, padded(width))
        kernels.pair_gradient_kernel[n, triton.cdiv(padded(width), options["SLICE"])](
            *(v.rows, start, partner[order], grad[order], du, padded(width)), **options
        )
    return u.gradient(du[:, :width], dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    row: Tensor,
    column: Tensor,
    *,
    normalize: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y from those of the scores (P,)."""
    with torch.cuda.device_of(x):
        u, v = _packed(x, y, normalize)
        if y is None:
            both, others = torch.cat([row, column]), torch.cat([column, row])
            return _row_gradient(u, u, both, others, torch.cat([grad, grad]), x.dtype) if need_x else None, None
        return (
            _row_gradient(u, v, row, column, grad, x.dtype) if need_x else None,
            _row_gradient(v, u, column, row, grad, y.dtype) if need_y else None,
        )
