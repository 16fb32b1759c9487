"""pair_dot: scores of an explicit list of pairs, and the list of all positive pairs of labelled rows.

    s_p = <x_{row_p}, y_{column_p}>,      dX_i = sum over p with row_p = i of g_p y_{column_p}, and likewise dY

(of unit rows where normalised). Cost: P D in each direction. Kept for backward: the rows and the list.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import pair_dot as reference
from fastret.backends.rows import accumulation_dtype
from fastret.backends.segments import label_segments
from fastret.ops import checks
from fastret.ops.library import apply, define, refuse


def positive_pairs(labels: Tensor, y_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(row (P,), column (P,)) int64 of all pairs with equal labels, row by row.

    Args:
        labels: (N,) integers.
        y_labels: (M,) integers; None: the rows themselves, of which none is paired with itself.
    """
    row, column = torch.ops.fastret.positive_pairs.default(labels, y_labels)
    return row, column


def pair_dot(
    x: Tensor,
    y: Tensor | None,
    row: Tensor,
    column: Tensor,
    *,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """(P,) scores of pairs; formula, gradient and cost stand at the top of this file.

    Args:
        x: (N, D) rows. y: (M, D) columns; None: x itself.
        row, column: (P,) integers in [0, N) and [0, M).
        normalize: cosine scores; False: raw dot products.
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    if y is not None:
        checks.check_rows(y, "y", like=x)
        shared = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(shared), y.to(shared)
    _check_list(row, "row", x)
    checks.check_labels(column, row, "column")
    row, column = row.to(torch.int64), column.to(torch.int64)
    chosen = registry.resolve("pair_dot", x.device, x.dtype, impl)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.pair_dot(x, y, row, column, normalize=normalize)
    scores: Tensor = apply(_PairDot, x, y, row, column, normalize, chosen)
    return scores


def _check_list(row: Tensor, name: str, x: Tensor) -> None:
    if not isinstance(row, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape (P,), got {type(row).__name__}")
    checks.check_labels(row, row, name)
    if row.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like the rows, got {row.device}")


def _positive_pairs(labels: Tensor, y_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    segments = label_segments(labels, y_labels)
    row = torch.repeat_interleave(segments.count)
    place = torch.arange(len(row), device=row.device) - segments.first_pair()[row]
    column = segments.order[segments.start[row] + place]
    if y_labels is None:
        other = row != column
        row, column = row[other], column[other]
    return row, column


def _positive_pairs_fake(labels: Tensor, y_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return labels.new_empty(pairs, dtype=torch.int64), labels.new_empty(pairs, dtype=torch.int64)


def _forward(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, normalize: bool, impl: str) -> Tensor:
    checks.check_range(row, x.shape[0], "row")
    checks.check_range(column, (x if y is None else y).shape[0], "column")
    module = registry.IMPLEMENTATIONS[impl].module("pair_dot")
    scores: Tensor = module.forward(x, y, row, column, normalize=normalize)
    return scores


def _forward_fake(x: Tensor, y: Tensor | None, row: Tensor, *_: Any) -> Tensor:
    return x.new_empty(row.shape, dtype=accumulation_dtype(x.dtype))


def _backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    row: Tensor,
    column: Tensor,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    module = registry.IMPLEMENTATIONS[impl].module("pair_dot")
    dx, dy = module.backward(grad, x, y, row, column, normalize=normalize, need_x=need_x, need_y=need_y)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing.clone() if dy is None else dy


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    row: Tensor,
    column: Tensor,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), x.new_empty(y.shape if y is not None and need_y else 0)


define("positive_pairs(Tensor labels, Tensor? y_labels) -> (Tensor, Tensor)", _positive_pairs, _positive_pairs_fake)
define(
    "pair_dot(Tensor x, Tensor? y, Tensor row, Tensor column, bool normalize, str impl) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "pair_dot_backward(Tensor grad, Tensor x, Tensor? y, Tensor row, Tensor column, bool normalize, bool need_x, "
    "bool need_y, str impl) -> (Tensor dx, Tensor dy)",
    _backward,
    _backward_fake,
)

_forward_operator = torch.ops.fastret.pair_dot.default
_backward_operator = torch.ops.fastret.pair_dot_backward.default


class _PairDot(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, normalize: bool, impl: str) -> Tensor:
        scores: Tensor = _forward_operator(x, y, row, column, normalize, impl)
        return scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, row, column, ctx.normalize, ctx.impl = inputs
        ctx.save_for_backward(x, y, row, column)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_y = ctx.needs_input_grad[:2]
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _PairDotBackward.apply
        dx, dy = compute(grad, *ctx.saved_tensors, ctx.normalize, need_x, need_y, ctx.impl)
        return dx if need_x else None, dy if need_y else None, *[None] * 4


class _PairDotBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("pair_dot", "a second differentiation")
