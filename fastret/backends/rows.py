"""Rows on their way into and out of a kernel: sorted, L2-normalised without overflow; and gradients back."""

from dataclasses import dataclass

import torch
from torch import Tensor

NORM_EPS = 1e-12  # as torch.nn.functional.normalize: shorter rows are divided by this


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses and sums are kept in float32, or float64 for float64 rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_norms(x: Tensor) -> Tensor:
    """(N, 1) divisors max(||x_i||, eps), exact also where the sum of squares would overflow or underflow."""
    wide = x.to(accumulation_dtype(x.dtype))
    # a constant factor to autograd: the norm does not depend on it
    largest = wide.detach().abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    safe = torch.where(largest > 0, largest, 1)  # NaN stays NaN through `wide`
    norms: Tensor = torch.linalg.vector_norm(wide / safe, dim=1, keepdim=True) * largest
    return norms.clamp_min(NORM_EPS)


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their norms, in the accumulation dtype; differentiable."""
    return x.to(accumulation_dtype(x.dtype)) / row_norms(x)


def poison(*rows: Tensor) -> Tensor:
    """0, or NaN when any element is NaN or infinite: a bounded function of the scores would hide it."""
    wide = accumulation_dtype(rows[0].dtype)
    extremes = [v.to(wide) for r in rows if r.numel() for v in r.detach().aminmax()]
    if not extremes:
        return torch.zeros((), dtype=wide, device=rows[0].device)
    total: Tensor = (0 * torch.stack(extremes)).sum()
    return total


@dataclass(frozen=True)
class PackedRows:
    """Rows sorted by ``order``, or in their own, slice(None), and, where asked, divided by ``norms`` (N, 1)."""

    rows: Tensor
    order: Tensor | slice
    norms: Tensor | None

    def gradient(self, du: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the caller's rows from that of the packed ones: (I - u u^T) du / norm, unsorted."""
        if self.norms is not None:
            u = self.rows.to(du.dtype)
            radial = (du * u).sum(1, keepdim=True)
            du = (du - torch.where(self.norms > NORM_EPS, radial, 0) * u) / self.norms
        if isinstance(self.order, slice):
            return du.to(dtype)
        dx = torch.empty(du.shape, dtype=dtype, device=du.device)
        dx[self.order] = du.to(dtype)
        return dx


def pack_rows(x: Tensor, order: Tensor | slice, normalize: bool, dtype: torch.dtype | None = None) -> PackedRows:
    """``x[order]`` (normalised) in ``dtype``; default: the accumulation dtype."""
    rows = x[order]
    wide = rows.to(accumulation_dtype(x.dtype))
    norms = row_norms(rows) if normalize else None
    return PackedRows((wide if norms is None else wide / norms).to(dtype or wide.dtype), order, norms)
