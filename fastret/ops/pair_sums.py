"""pair_sums: for every row, the sum of a function of its pairs and of one number of the row,

    r_i = sum over j allowed of phi(z_ij),      z_ij = scale <x_i, y_j> + b_j - c_i

(of unit rows where normalised), phi of a small named set (``fastret.backends.phi``): log(1 - e^z), where c is the row's
log-sum-exp; the hinge max(0, z), where c is a margin or the row's hardest score; the distance sqrt(-z) and its inverse,
where scale = 2, c_i = ||x_i||^2 and b_j = -||y_j||^2 (unit rows: c = 2, no b). With g = dL/dr and W_ij = g_i phi'(z_ij)

    dX = scale W Y,   dY = scale W^T X,   d scale = sum of W s,   d c_i = -sum_j W_ij,   d b_j = sum_i W_ij

It is a head of ``fastret.ops.masked_lse``, whose program, cost and memory it shares.
"""

import torch
from torch import Tensor

from fastret.backends import phi as functions
from fastret.backends.pairs import Head, PairMask
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse


def pair_sums(
    x: Tensor,
    y: Tensor | None = None,
    *,
    phi: str,
    row_stat: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mask: PairMask | None = None,
    column_bias: Tensor | None = None,
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """(N,) sums; formula and gradient stand at the top of this file.

    Args:
        x: (N, D) rows. y: (M, D) columns; None: x itself.
        phi: "log1m_exp", "hinge", "distance" or "inverse_distance".
        row_stat: (N,) c, receives a gradient; None: 0.
        scale: a number, or a 0-dim tensor that receives a gradient.
        mask: pairs that are summed; None: all.
        column_bias: (M,) b, receives a gradient; None: 0.
        normalize: cosine scores; False: raw dot products.
        first_column, columns, impl: as in ``masked_lse``; sums of pieces of the columns add.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    if phi not in functions.NAMES:
        raise ValueError(f"phi: expected one of {', '.join(functions.NAMES)}, got {phi!r}")
    if row_stat is not None:
        checks.check_vector(row_stat, x, "row_stat")
    bias = None if row_stat is None else torch.neg(row_stat)
    head = Head(scale, mask or PairMask(), row_bias=bias, column_bias=column_bias, reduce=phi)
    ((sums, _),) = masked_lse(
        x, y, heads=[head], normalize=normalize, first_column=first_column, columns=columns, impl=impl
    )
    return sums
