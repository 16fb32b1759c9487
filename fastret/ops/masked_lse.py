"""masked_lse: log-sum-exp and target score of every row (or column) of a masked pair matrix that is never stored.

For scores s_ij = <x_i, y_j> (of unit rows where normalised) and each head, with logits l_ij = scale s_ij + a_i + b_j,

    lse_i = log sum over j allowed by the head's mask of exp(l_ij),      t_i = sum over j of Y_ij l_ij

(a head over columns: the same sums over i). InfoNCE (van den Oord et al., arXiv 1807.03748) is lse - t. A row without
an allowed pair has lse = -inf and no gradient. With P = exp(l - lse) and upstream gradients g of lse, h of t,

    W_ij = g_i P_ij + h_i Y_ij,   dS = scale W,   d scale = sum of W s,   d a = row sums of W,   d b = column sums of W

and dX = dS Y, dY = dS^T X; y = None: dX = (dS + dS^T) X. All heads share one product of rows in each direction.

Cost: N M D products forward, and three times that backward (twice where one side is detached). Kept for backward: the
rows, what the heads refer to, and lse: O(N + M), nothing N x M.

The interface of an implementation, ``fastret.backends.*.masked_lse`` (types in ``fastret.backends.pairs``):

    forward(x, y, heads, *, normalize, first_column, columns) -> list[tuple[Tensor, Tensor]]
    backward(grads, x, y, heads, lses, *, normalize, first_column, columns, need) -> Gradients
    sweep(x, y, head, row_weight, *, normalize, first_column, columns, need) -> tuple[Tensor, Gradients]      (optional)

- x (N, D), y (M, D) or None: one floating point dtype, any strides, N, M >= 0. Results and lses are float32, or
  float64 for float64 rows ("the accumulation dtype"), (N,) or (M,) by the head's axis; so are grads, a (g, h) a head.
- heads: ``Head`` objects. Every tensor in them is contiguous and int64 (labels, ids, indices) or of the accumulation
  dtype (scale 0-dim, biases, thresholds, weights); what stands one per column has M entries.
- first_column: number of the first of the M columns in a whole matrix of ``columns``: column numbers in heads
  (index, offset, period) count from there; the pieces' lse merge by logaddexp, their t by addition.
- need: which gradients; scale and bias gradients are those of heads that have such tensors. With y None, dx is that of
  both sides. A gradient has the dtype of its rows, scale and biases that of accumulation.
- NaN or infinity anywhere in x or y makes every result NaN. A row without an allowed pair contributes nothing through
  g, whatever g is. Masks by threshold must come out alike in both directions.
- sweep: sum of row_weight_i (lse_i - t_i) over the rows of a row head, and its gradients in the accumulation dtype, from
  one product; a row of weight 0 counts nothing, also where its lse is -inf. Without it, forward and backward are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Gradients, Head, Indexed, Need
from fastret.backends.reference import masked_lse as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.heads import FlatHeads, axes, check_heads, flatten, restore
from fastret.ops.library import define, refuse


def masked_lse(
    x: Tensor,
    y: Tensor | None = None,
    *,
    heads: Sequence[Head],
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
    impl: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head; formula, gradient and cost stand at the top of this file.

    Args:
        x: (N, D) rows.
        y: (M, D) columns; None: x itself.
        heads: what is summed, under which mask and against which target; they share one product of rows.
        normalize: cosine scores; False: raw dot products.
        first_column: y is a piece of a larger matrix and its first row has this number there. Pieces merge:
            ``torch.logaddexp`` of their lse, sum of their t (of row heads; those of column heads are of the piece alone).
        columns: number of columns of the whole matrix; None: first_column + M.
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        A pair a head, each (N,), or (M,) for a head over columns; float32, or float64 for float64 rows. Gradients reach
        x, y, and each head's scale and biases.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    x, y, columns = checked(x, y, heads, first_column, columns)
    chosen = registry.resolve("masked_lse", x.device.type, x.dtype, impl)
    flat = flatten(heads, accumulation_dtype(x.dtype))
    if chosen == "reference":
        restored = _restored(flat)
        _check_indices(restored, columns)
        return reference.masked_lse(
            x, y, restored, normalize=normalize, first_column=first_column, columns=columns
        )
    results = _MaskedLse.apply(
        x,
        y,
        flat.scale,
        flat.row_bias,
        flat.column_bias,
        flat.tensors,
        flat.numbers,
        flat.factors,
        flat.spec,
        normalize,
        first_column,
        columns,
        chosen,
    )
    return [(results[2 * k], results[2 * k + 1]) for k in range(len(heads))]
