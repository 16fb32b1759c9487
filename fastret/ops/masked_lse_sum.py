"""masked_lse_sum: the one-sweep form of masked_lse, for losses that are a weighted sum over rows,

    L = sum over i of w_i (lse_i - t_i),      dS_ij = scale w_i (P_ij - Y_ij)

of ``fastret.ops.masked_lse`` with constant weights w. The slope of every row is known as soon as its lse is, so loss
and gradients come from one product of rows, in forward: 3 N M D instead of 4. Backward multiplies the gradients, kept
in the accumulation dtype, with the upstream one: in place, where the graph is freed with that backward, so that a
million proxies have one gradient and not two. Where no gradient is wanted, none is computed or kept.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Gradients, Head, Need
from fastret.backends.reference import masked_lse as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.library import apply, define, loop_under_vmap, refuse
from fastret.ops.masked_lse import checked
from fastret.ops.problem import LEARNED, SCHEMA, Problem, flat_gradients, pack


def masked_lse_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    head: Head,
    row_weight: Tensor,
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
    centers: int = 1,
    center_temperature: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """sum of row_weight_i (lse_i - t_i), 0-dim; formula and cost stand at the top of this file.

    Args:
        x, y, normalize, first_column, columns, centers, center_temperature, impl: as in ``masked_lse``.
        head: one head over rows.
        row_weight: (N,) constants; a row of weight 0 counts nothing, also where no pair of it is allowed.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: sub-centres with impl="triton".
    """
    x, y, columns = checked(x, y, (head,), first_column, columns, centers, center_temperature)
    if head.axis != "row":
        raise ValueError(f"head.axis: expected 'row', got {head.axis!r}")
    checks.check_vector(row_weight, x, "row_weight")
    row_weight = row_weight.detach().to(accumulation_dtype(x.dtype))
    chosen = registry.resolve("masked_lse", x.device, x.dtype, impl, ("centers",) if centers > 1 else ())
    problem = pack(
        x,
        y,
        (head,),
        normalize=normalize,
        first_column=first_column,
        columns=columns,
        centers=centers,
        center_temperature=center_temperature,
        impl=chosen,
    )
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            ((lse, t),) = reference.masked_lse(x, y, problem.checked_heads(), **problem.options())
        return weighted_sum(lse, t, row_weight)
    need = [checks.wants_gradient(t) for t in problem[:LEARNED]]
    result, *_ = apply(_MaskedLseSum, *problem, row_weight, need)
    loss: Tensor = result
    return loss


def weighted_sum(lse: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """sum of weight (lse - t), where lse = -inf with weight 0 counts nothing; NaN is never hidden."""
    empty = (weight == 0) & (lse == -torch.inf)
    return (weight * torch.where(empty, 0 * t, lse - t)).sum()


def _forward(*arguments: Any) -> list[Tensor]:
    *given, row_weight, need = arguments
    problem = Problem(*given)
    x, y, module = problem.x, problem.y, problem.module()
    (head,) = problem.checked_heads()
    options = problem.options()
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


def _forward_fake(*arguments: Any) -> list[Tensor]:
    *given, _, need = arguments
    problem = Problem(*given)
    wide = accumulation_dtype(problem.x.dtype)
    return [problem.x.new_empty((), dtype=wide), *problem.empty_gradients(need, wide)]


define(
    f"masked_lse_sum({SCHEMA}, Tensor row_weight, bool[] need) -> Tensor[]",
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
        row_weight: Tensor,
        need: list[bool],
    ) -> tuple[Tensor, ...]:
        return tuple(
            _operator(
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
                row_weight,
                need,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *gradients = output
        ctx.need = inputs[-1]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros for each of them
        ctx.save_for_backward(*gradients, *inputs[:LEARNED])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        constants = [None] * (len(Problem._fields) - LEARNED + 2)
        if grad is None:
            return *[None] * LEARNED, *constants
        saved = ctx.saved_tensors  # once: under activation checkpointing a second reading is an error
        gradients, inputs = saved[:LEARNED], saved[LEARNED:]
        compiling = torch.compiler.is_compiling()
        last = not compiling and _is_last_use(grad)
        results: list[Tensor | None] = []
        for gradient, given, wanted in zip(gradients, inputs, ctx.need, strict=True):
            if not wanted:
                results.append(None)
            elif last:
                results.append(_scale_(gradient, grad).to(given.dtype))
            elif compiling:
                results.append((gradient * grad).to(given.dtype))
            else:
                results.append(_Scaled.apply(gradient, grad, given.dtype, *inputs))
        return *results, *constants


def _is_last_use(upstream: Tensor) -> bool:
    """Whether what was saved is freed after this backward, and no derivative of it is wanted: then it may be the
    gradient itself. A graph that is kept needs it again, and whoever owns the gradient may add to it in place."""
    batched = checks.is_wrapped(upstream) or torch._C._functorch.is_legacy_batchedtensor(upstream)
    if batched or torch.is_grad_enabled():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    if upstream.device.type == "cpu" and upstream.item() == 1:  # elsewhere reading it would wait for the device
        return gradient
    return gradient.mul_(upstream)


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
