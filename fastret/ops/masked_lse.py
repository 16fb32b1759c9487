"""masked_lse: log-sum-exp and target score of every row (or column) of a masked pair matrix that is never stored.

For scores s_ij = <x_i, y_j> (of unit rows where normalised) and each head, with logits l_ij = scale s_ij + a_i + b_j,

    lse_i = log sum over j allowed by the head's mask of exp(l_ij),      t_i = sum over j of Y_ij l_ij

(a head over columns: the same sums over i). InfoNCE (van den Oord et al., arXiv 1807.03748) is lse - t. A row without
an allowed pair has lse = -inf and no gradient. With P = exp(l - lse) and upstream gradients g of lse, h of t,

    W_ij = g_i P_ij + h_i Y_ij,   dS = scale W,   d scale = sum of W s,   d a = row sums of W,   d b = column sums of W

and dX = dS Y, dY = dS^T X; y = None: dX = (dS + dS^T) X. All heads share one product of rows in each direction. A head
may sum phi(l_ij) of ``fastret.backends.phi`` in place of the lse: then P = phi'(l) (``fastret.ops.pair_sums``).

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
- a head that sums phi has that sum where others have lse; the pieces of columns add.
- need: which gradients; scale and bias gradients are those of heads that have such tensors. With y None, dx is that of
  both sides. A gradient has the dtype of its rows, scale and biases that of accumulation.
- NaN or infinity anywhere in x or y makes every result NaN. A row without an allowed pair contributes nothing through
  g, whatever g is. Masks by threshold must come out alike in both directions.
- sweep: sum of row_weight_i (lse_i - t_i) over the rows of a row head, and its gradients in the accumulation dtype,
  from one product; a row of weight 0 counts nothing, also where its lse is -inf. Without it, forward and backward are
  used.
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
from fastret.ops.library import define, loop_under_vmap, refuse


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
            ``torch.logaddexp`` of their lse, sum of their t (of row heads; those of column heads stand as they are).
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
        with torch.autocast(x.device.type, enabled=False):
            return reference.masked_lse(
                x, y, restored(flat, columns), normalize=normalize, first_column=first_column, columns=columns
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


def checked(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], first_column: int, columns: int | None
) -> tuple[Tensor, Tensor | None, int]:
    """x and y in one dtype, and the number of columns of the whole matrix."""
    checks.check_rows(x, "x")
    if y is not None:
        checks.check_rows(y, "y", like=x)
        shared = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(shared), y.to(shared)
    check_heads(heads, x, x if y is None else y)
    if first_column < 0:
        raise ValueError(f"first_column: expected at least 0, got {first_column}")
    last = first_column + (x if y is None else y).shape[0]
    if columns is not None and columns < last:
        raise ValueError(f"columns: expected at least first_column + M = {last}, got {columns}")
    return x, y, last if columns is None else columns


def restored(flat: FlatHeads, columns: int) -> list[Head]:
    """Heads as implementations get them, the values of their indices checked."""
    heads = restore(flat.spec, flat.scale, flat.row_bias, flat.column_bias, flat.tensors, flat.numbers, flat.factors)
    for k, head in enumerate(heads):
        if isinstance(head.target, Indexed):
            index = head.target.index
            checks.check_range(index, columns, f"heads[{k}].target.index")
    return heads


def _forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    normalize: bool,
    first_column: int,
    columns: int,
    impl: str,
) -> list[Tensor]:
    heads = restored(FlatHeads(spec, scale, row_bias, column_bias, tensors, numbers, factors), columns)
    module = registry.IMPLEMENTATIONS[impl].module("masked_lse")
    results = module.forward(x, y, heads, normalize=normalize, first_column=first_column, columns=columns)
    return [t for pair in results for t in pair]


def _forward_fake(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    *_: Any,
) -> list[Tensor]:
    sizes = {"row": x.shape[0], "column": (x if y is None else y).shape[0]}
    return [x.new_empty(sizes[axis], dtype=accumulation_dtype(x.dtype)) for axis in axes(spec) for _ in range(2)]


def _backward(
    grads: list[Tensor],
    lses: list[Tensor],
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    normalize: bool,
    first_column: int,
    columns: int,
    impl: str,
    need: list[bool],
) -> list[Tensor]:
    heads = restore(spec, scale, row_bias, column_bias, tensors, numbers, factors)
    module = registry.IMPLEMENTATIONS[impl].module("masked_lse")
    pairs = list(zip(grads[::2], grads[1::2], strict=True))
    options = {"normalize": normalize, "first_column": first_column, "columns": columns}
    return flat_gradients(module.backward(pairs, x, y, heads, lses, **options, need=Need(*need)), x)


def flat_gradients(gradients: Gradients, x: Tensor) -> list[Tensor]:
    """Gradients of x, y, scale (K,), row_bias (K', N), column_bias (K'', M); an empty tensor where not wanted."""

    def stacked(values: list[Tensor | None]) -> Tensor:
        given = [v for v in values if v is not None]
        return torch.stack(given) if given else x.new_empty(0)

    sides = [x.new_empty(0) if side is None else side for side in gradients[:2]]
    return [*sides, stacked(gradients.scale), stacked(gradients.row_bias), stacked(gradients.column_bias)]


def _backward_fake(
    grads: list[Tensor],
    lses: list[Tensor],
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    normalize: bool,
    first_column: int,
    columns: int,
    impl: str,
    need: list[bool],
) -> list[Tensor]:
    return [
        x.new_empty(0) if t is None or not wanted else t.new_empty(t.shape)
        for t, wanted in zip((x, y, scale, row_bias, column_bias), need, strict=True)
    ]


_PROBLEM = (
    "Tensor x, Tensor? y, Tensor? scale, Tensor? row_bias, Tensor? column_bias, Tensor[] tensors, SymInt[] numbers, "
    "float[] factors, str spec, bool normalize, SymInt first_column, SymInt columns, str impl"
)
define(f"masked_lse({_PROBLEM}) -> Tensor[]", _forward, _forward_fake)
define(
    f"masked_lse_backward(Tensor[] grads, Tensor[] lses, {_PROBLEM}, bool[] need) -> Tensor[]",
    _backward,
    _backward_fake,
)

loop_under_vmap("masked_lse")
loop_under_vmap("masked_lse_backward")

_forward_operator = torch.ops.fastret.masked_lse.default
_backward_operator = torch.ops.fastret.masked_lse_backward.default


class _MaskedLse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        scale: Tensor | None,
        row_bias: Tensor | None,
        column_bias: Tensor | None,
        tensors: list[Tensor],
        numbers: list[int],
        factors: list[float],
        spec: str,
        normalize: bool,
        first_column: int,
        columns: int,
        impl: str,
    ) -> tuple[Tensor, ...]:
        return tuple(
            _forward_operator(
                x,
                y,
                scale,
                row_bias,
                column_bias,
                tensors,
                numbers,
                factors,
                spec,
                normalize,
                first_column,
                columns,
                impl,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, scale, row_bias, column_bias, tensors, *ctx.options = inputs
        ctx.heads = len(output) // 2
        ctx.save_for_backward(x, y, scale, row_bias, column_bias, *output[::2], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row_bias, column_bias, *rest = ctx.saved_tensors
        lses, tensors = rest[: ctx.heads], rest[ctx.heads :]
        need = list(ctx.needs_input_grad[:5])
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _MaskedLseBackward.apply
        gradients = compute(list(grads), lses, x, y, scale, row_bias, column_bias, tensors, *ctx.options, need)
        return *(g if wanted else None for g, wanted in zip(gradients, need, strict=True)), *[None] * 8


class _MaskedLseBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(_backward_operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("masked_lse", "a second differentiation")
