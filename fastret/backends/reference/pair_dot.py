"""pair_dot as it is defined: both rows of every pair gathered."""

from torch import Tensor

from fastret.backends.rows import accumulation_dtype, unit_rows


def pair_dot(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, *, normalize: bool) -> Tensor:
    """(P,) scores <x_row, y_column>. Differentiable by autograd, twice."""
    y = x if y is None else y
    x, y = (rows.to(accumulation_dtype(rows.dtype)) for rows in (x, y))
    if normalize:
        x, y = unit_rows(x), unit_rows(y)
    return (x[row] * y[column]).sum(1)
