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

Sub-centres: every K consecutive rows of y are the centres of a class, and s_ij is what their scores are reduced to
(``fastret.backends.centers``): a column is a class then, M their number, and all of the above holds with it.

The interface of an implementation, ``fastret.backends.*.masked_lse`` (types in ``fastret.backends.pairs``):

    forward(x, y, heads, *, normalize, first_column, columns, centers=None) -> list[tuple[Tensor, Tensor]]
    backward(grads, x, y, heads, lses, *, normalize, first_column, columns, need, centers=None) -> Gradients
    sweep(x, y, head, row_weight, *, normalize, first_column, columns, need, centers=None) -> tuple[Tensor, Gradients]

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
- centers: ``fastret.backends.centers.Centers`` or None; M is then the number of classes, y (M K, D) is not None, and no
  head has a width. One that has no sub-centres takes no such argument, and says so (``fastret.backends.registry``).
- sweep (optional): sum of row_weight_i (lse_i - t_i) over the rows of a row head, and its gradients in the accumulation
  dtype, from one product; a row of weight 0 counts nothing, also where its lse is -inf. Without it, forward and
  backward are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Head, Need
from fastret.backends.reference import masked_lse as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.heads import axes, check_heads
from fastret.ops.library import apply, define, loop_under_vmap, refuse
from fastret.ops.problem import LEARNED, SCHEMA, Problem, flat_gradients, pack


def masked_lse(
    x: Tensor,
    y: Tensor | None = None,
    *,
    heads: Sequence[Head],
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
    centers: int = 1,
    center_temperature: float | None = None,
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
        centers: K; y is then (M K, D), the centres of a class in consecutive rows, and every number of a column (index,
            offset, first_column, columns) or tensor of one entry a column is that of a class.
        center_temperature: > 0: scores of a class' centres become their mean under a softmax over it; None: their
            maximum (the first of equals).
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        A pair a head, each (N,), or (M,) for a head over columns; float32, or float64 for float64 rows. Gradients reach
        x, y, and each head's scale and biases.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: sub-centres with impl="triton".
    """
    x, y, columns = checked(x, y, heads, first_column, columns, centers, center_temperature)
    chosen = registry.resolve("masked_lse", x.device, x.dtype, impl, ("centers",) if centers > 1 else ())
    problem = pack(
        x,
        y,
        heads,
        normalize=normalize,
        first_column=first_column,
        columns=columns,
        centers=centers,
        center_temperature=center_temperature,
        impl=chosen,
    )
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.masked_lse(x, y, problem.checked_heads(), **problem.options())
    results = apply(_MaskedLse, *problem)
    return [(results[2 * k], results[2 * k + 1]) for k in range(len(heads))]


def checked(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    first_column: int,
    columns: int | None,
    centers: int = 1,
    center_temperature: float | None = None,
) -> tuple[Tensor, Tensor | None, int]:
    """x and y in one dtype, and the number of columns of the whole matrix."""
    checks.check_rows(x, "x")
    if y is not None:
        checks.check_rows(y, "y", like=x)
        shared = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(shared), y.to(shared)
    _check_centers(y, centers, center_temperature)
    here = (x if y is None else y).shape[0] // centers
    check_heads(heads, x, here)
    for k, head in enumerate(heads):
        if centers > 1 and head.width is not None:
            raise ValueError(f"heads[{k}].width: expected None with centers, got {head.width}")
    if first_column < 0:
        raise ValueError(f"first_column: expected at least 0, got {first_column}")
    last = first_column + here
    if columns is not None and columns < last:
        raise ValueError(f"columns: expected at least first_column + M = {last}, got {columns}")
    return x, y, last if columns is None else columns


def _check_centers(y: Tensor | None, centers: int, temperature: float | None) -> None:
    checks.check_centers(y, centers, "y")
    if centers > 1 and y is None:
        raise ValueError(f"y: expected the {centers} centers of each class, got None")
    if temperature is not None:
        checks.check_number(temperature, "center_temperature")
        if temperature < torch.finfo(torch.float32).tiny:  # its inverse has to be finite
            raise ValueError(f"center_temperature: expected a positive number, got {temperature}")


def _forward(*arguments: Any) -> list[Tensor]:
    problem = Problem(*arguments)
    results = problem.module().forward(problem.x, problem.y, problem.checked_heads(), **problem.options())
    return [t for pair in results for t in pair]


def _forward_fake(*arguments: Any) -> list[Tensor]:
    problem = Problem(*arguments)
    x, y = problem.x, problem.y
    sizes = {"row": x.shape[0], "column": (x if y is None else y).shape[0] // problem.centers}
    return [
        x.new_empty(sizes[axis], dtype=accumulation_dtype(x.dtype)) for axis in axes(problem.spec) for _ in range(2)
    ]


def _backward(grads: list[Tensor], lses: list[Tensor], *arguments: Any) -> list[Tensor]:
    *given, need = arguments
    problem = Problem(*given)
    pairs = list(zip(grads[::2], grads[1::2], strict=True))
    compute, options = problem.module().backward, problem.options()
    gradients = compute(pairs, problem.x, problem.y, problem.heads(), lses, **options, need=Need(*need))
    return flat_gradients(gradients, problem.x)


def _backward_fake(grads: list[Tensor], lses: list[Tensor], *arguments: Any) -> list[Tensor]:
    *given, need = arguments
    return Problem(*given).empty_gradients(need)


define(f"masked_lse({SCHEMA}) -> Tensor[]", _forward, _forward_fake)
define(
    f"masked_lse_backward(Tensor[] grads, Tensor[] lses, {SCHEMA}, bool[] need) -> Tensor[]", _backward, _backward_fake
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
        centers: int,
        center_temperature: float | None,
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
                centers,
                center_temperature,
                impl,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem = Problem(*inputs)
        ctx.options = inputs[LEARNED + 1 :]
        ctx.heads = len(output) // 2
        ctx.save_for_backward(*problem[:LEARNED], *output[::2], *problem.tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing a second reading is an error
        learned, rest = saved[:LEARNED], saved[LEARNED:]
        lses, tensors = rest[: ctx.heads], rest[ctx.heads :]
        need = list(ctx.needs_input_grad[:LEARNED])
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _MaskedLseBackward.apply
        gradients = compute(list(grads), lses, *learned, tensors, *ctx.options, need)
        constants = [None] * (len(Problem._fields) - LEARNED)
        return *(g if wanted else None for g, wanted in zip(gradients, need, strict=True)), *constants


class _MaskedLseBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return tuple(_backward_operator(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("masked_lse", "a second differentiation")
