"""row_extrema: the least or greatest score of every row under a mask, and where it stands.

    v_i = min (or max) over j allowed of <x_i, y_j>,      a_i = the least such j

(of unit rows where normalised). A row without an allowed pair has v = +inf (max: -inf) and a = -1. Several extrema
share one product of rows. The gradient of v_i is that of the score at (i, a_i): a scatter of N rows an extremum.

Cost: N M D products forward, N D backward. Kept for backward: the rows and the indices.

The interface of an implementation, ``fastret.backends.*.row_extrema``:

    forward(x, y, extrema, *, normalize, first_column) -> list[tuple[Tensor, Tensor]]

with extrema (kind, mask) as ``masked_lse`` has masks; values (N,) in the accumulation dtype, indices (N,) int64. Scores
are those that ``masked_lse`` of the implementation has for the same x and y, bit for bit, so that thresholds derived
from extrema mean the same pairs there. NaN or infinity anywhere in x or y makes every value NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.backends.reference import row_extrema as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops.heads import axes, flatten, restore
from fastret.ops.library import apply, define, loop_under_vmap, refuse
from fastret.ops.masked_lse import checked

Extrema = Sequence[tuple[str, PairMask]]


def row_extrema(
    x: Tensor,
    y: Tensor | None = None,
    *,
    extrema: Extrema,
    normalize: bool = True,
    first_column: int = 0,
    impl: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum; definition and gradient stand at the top of this file.

    Args:
        x: (N, D) rows. y: (M, D) columns; None: x itself.
        extrema: pairs of "min" or "max" and the mask under which it is taken.
        normalize: cosine scores; False: raw dot products.
        first_column: y is a piece of a larger matrix and its first row has this number there; indices count from there.
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        A pair an extremum: (N,) values, float32, or float64 for float64 rows, with gradients to x and y; (N,) int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    for k, (kind, _) in enumerate(extrema):
        if kind not in ("min", "max"):
            raise ValueError(f"extrema[{k}]: expected 'min' or 'max' and a mask, got {kind!r}")
    heads = [Head(mask=mask) for _, mask in extrema]
    x, y, _ = checked(x, y, heads, first_column, None)
    chosen = registry.resolve("row_extrema", x.device, x.dtype, impl)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.row_extrema(x, y, extrema, normalize=normalize, first_column=first_column)
    scatter = registry.resolve("pair_dot", x.device, x.dtype, impl)
    named = [Head(mask=mask, reduce=kind) for kind, mask in extrema]
    flat = flatten(named, accumulation_dtype(x.dtype))
    results = apply(
        _RowExtrema, x, y, flat.tensors, flat.numbers, flat.factors, flat.spec, normalize, first_column, chosen, scatter
    )
    return [(results[2 * k], results[2 * k + 1]) for k in range(len(heads))]


def _forward(
    x: Tensor,
    y: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    normalize: bool,
    first_column: int,
    impl: str,
) -> list[Tensor]:
    heads = restore(spec, None, None, None, tensors, numbers, factors)
    module = registry.IMPLEMENTATIONS[impl].module("row_extrema")
    extrema = [(head.reduce, head.mask) for head in heads]
    results = module.forward(x, y, extrema, normalize=normalize, first_column=first_column)
    return [t for pair in results for t in pair]


def _forward_fake(
    x: Tensor,
    y: Tensor | None,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    *_: Any,
) -> list[Tensor]:
    return [
        x.new_empty(x.shape[0], dtype=dtype) for _ in axes(spec) for dtype in (accumulation_dtype(x.dtype), torch.int64)
    ]


define(
    "row_extrema(Tensor x, Tensor? y, Tensor[] tensors, SymInt[] numbers, float[] factors, str spec, bool normalize, "
    "SymInt first_column, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
loop_under_vmap("row_extrema")

_forward_operator = torch.ops.fastret.row_extrema.default
_scatter_operator = torch.ops.fastret.pair_dot_backward.default


class _RowExtrema(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        tensors: list[Tensor],
        numbers: list[int],
        factors: list[float],
        spec: str,
        normalize: bool,
        first_column: int,
        impl: str,
        scatter: str,
    ) -> tuple[Tensor, ...]:
        return tuple(_forward_operator(x, y, tensors, numbers, factors, spec, normalize, first_column, impl))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, *_, ctx.normalize, ctx.first_column, _, ctx.scatter = inputs
        ctx.mark_non_differentiable(*output[1::2])
        ctx.save_for_backward(x, y, *output[1::2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *indices = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        if y is not None and not len(y):  # nothing is named
            return x.new_zeros(x.shape) if need_x else None, y.new_zeros(y.shape) if need_y else None, *[None] * 8
        found = torch.cat(indices)
        grad = torch.where(found >= 0, torch.cat(grads[::2]), 0)
        row = torch.arange(x.shape[0], device=x.device).repeat(len(indices))
        column = (found - ctx.first_column).clamp_min(0)
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _scatter_operator if torch.compiler.is_compiling() else _RowExtremaBackward.apply
        dx, dy = compute(grad, x, y, row, column, ctx.normalize, need_x, need_y, ctx.scatter)
        return dx if need_x else None, dy if need_y else None, *[None] * 8


class _RowExtremaBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _scatter_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("row_extrema", "a second differentiation")
