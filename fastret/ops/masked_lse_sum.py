"""masked_lse_sum: the one-sweep form of masked_lse, for losses that are a weighted sum over rows,

    L = sum over i of w_i (lse_i - t_i),      dS_ij = scale w_i (P_ij - Y_ij)

of ``fastret.ops.masked_lse`` with constant weights w. The slope of every row is known as soon as its lse is, so loss
and gradients come from one product of rows, in forward: 3 N M D instead of 4. Backward multiplies the gradients, kept
in the accumulation dtype, with the upstream one. Where no gradient is wanted, none is computed or kept.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Gradients, Head, Need
from fastret.backends.reference import masked_lse as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.heads import FlatHeads, flatten
from fastret.ops.library import define, loop_under_vmap, refuse
from fastret.ops.masked_lse import checked, flat_gradients, restored


def masked_lse_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    head: Head,
    row_weight: Tensor,
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """sum of row_weight_i (lse_i - t_i), 0-dim; formula and cost stand at the top of this file.

    Args:
        x, y, normalize, first_column, columns, impl: as in ``masked_lse``.
        head: one head over rows.
        row_weight: (N,) constants; a row of weight 0 counts nothing, also where no pair of it is allowed.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    x, y, columns = checked(x, y, (head,), first_column, columns)
    if head.axis != "row":
        raise ValueError(f"head.axis: expected 'row', got {head.axis!r}")
    checks.check_vector(row_weight, x, "row_weight")
    wide = accumulation_dtype(x.dtype)
    row_weight = row_weight.detach().to(wide)
    chosen = registry.resolve("masked_lse", x.device.type, x.dtype, impl)
    flat = flatten((head,), wide)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            ((lse, t),) = reference.masked_lse(
                x, y, restored(flat, columns), normalize=normalize, first_column=first_column, columns=columns
            )
        return weighted_sum(lse, t, row_weight)
    need = [checks.wants_gradient(t) for t in (x, y, flat.scale, flat.row_bias, flat.column_bias)]
    result, *_ = _MaskedLseSum.apply(
        x,
        y,
        flat.scale,
        flat.row_bias,
        flat.column_bias,
        row_weight,
        flat.tensors,
        flat.numbers,
        flat.factors,
        flat.spec,
        normalize,
        first_column,
        columns,
        chosen,
        need,
    )
    loss: Tensor = result
    return loss


def weighted_sum(lse: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """sum of weight (lse - t), where lse = -inf with weight 0 counts nothing; NaN is never hidden."""
    empty = (weight == 0) & (lse == -torch.inf)
    return (weight * torch.where(empty, 0, lse - t)).sum()


def _forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    row_weight: Tensor,
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
    flat = FlatHeads(spec, scale, row_bias, column_bias, tensors, numbers, factors)
    (head,) = restored(flat, columns)
    module = registry.IMPLEMENTATIONS[impl].module("masked_lse")
    options = {"normalize": normalize, "first_column": first_column, "columns": columns}
    if hasattr(module, "sweep"):
        loss, gradients = module.sweep(x, y, head, row_weight, **options, need=Need(*need))
    else:
        ((lse, t),) = module.forward(x, y, [head], **options)
        loss, gradients = weighted_sum(lse, t, row_weight), Gradients(None, None, [None], [None], [None])
        if any(need):
            upstream = [(row_weight, -row_weight)]
            gradients = module.backward(upstream, x, y, [head], [lse], **options, need=Need(*need))
    wide = accumulation_dtype(x.dtype)
    return [loss, *(g.to(wide) for g in flat_gradients(gradients, x))]


def _forward_fake(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    row_weight: Tensor,
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
    wide = accumulation_dtype(x.dtype)
    gradients = [
        x.new_empty(t.shape if t is not None and wanted else 0, dtype=wide)
        for t, wanted in zip((x, y, scale, row_bias, column_bias), need, strict=True)
    ]
    return [x.new_empty((), dtype=wide), *gradients]


define(
    "masked_lse_sum(Tensor x, Tensor? y, Tensor? scale, Tensor? row_bias, Tensor? column_bias, Tensor row_weight, "
    "Tensor[] tensors, SymInt[] numbers, float[] factors, str spec, bool normalize, SymInt first_column, "
    "SymInt columns, str impl, bool[] need) -> Tensor[]",
    _forward,
    _forward_fake,
)

loop_under_vmap("masked_lse_sum")

_operator = torch.ops.fastret.masked_lse_sum.default


class _MaskedLseSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        scale: Tensor | None,
        row_bias: Tensor | None,
        column_bias: Tensor | None,
        row_weight: Tensor,
        tensors: list[Tensor],
        numbers: list[int],
        factors: list[float],
        spec: str,
        normalize: bool,
        first_column: int,
        columns: int,
        impl: str,
        need: list[bool],
    ) -> tuple[Tensor, ...]:
        return tuple(
            _operator(
                x,
                y,
                scale,
                row_bias,
                column_bias,
                row_weight,
                tensors,
                numbers,
                factors,
                spec,
                normalize,
                first_column,
                columns,
                impl,
                need,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *gradients = output
        ctx.need = inputs[-1]
        ctx.mark_non_differentiable(*gradients)
        ctx.save_for_backward(*gradients, *inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, inputs = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        compiling = torch.compiler.is_compiling()
        results: list[Tensor | None] = []
        for gradient, given, wanted in zip(gradients, inputs, ctx.need, strict=True):
            if not wanted:
                results.append(None)
            elif compiling:
                results.append((gradient * grad).to(given.dtype))
            else:
                results.append(_Scaled.apply(gradient, grad, given.dtype, *inputs))
        return *results, *[None] * 10


class _Scaled(torch.autograd.Function):
    """The saved gradients are constants to autograd; this ties them to what they depend on, so that differentiating
    them again is an error rather than silently zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, *_: Tensor | None) -> Tensor:
        return (gradient * upstream).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = refuse("masked_lse_sum", "a second differentiation")
