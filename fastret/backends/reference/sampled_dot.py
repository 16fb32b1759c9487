"""sampled_dot as it is defined: every drawn row gathered."""

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.backends.sampling import Draws


def sampled_dot(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> Tensor:
    """(N, S) scores. Differentiable by autograd, twice."""
    columns = [] if first is None else [first[:, None]]
    if index is not None:
        columns.append(index)
    if draws is not None:
        columns.append(draws.columns(len(x), len(bank)))
    rows = bank.to(accumulation_dtype(x.dtype))[torch.cat(columns, 1)]
    return torch.einsum("nd,nsd->ns", x.to(rows.dtype), rows)
