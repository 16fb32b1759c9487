"""rank_sums: soft ranks of each query's positives.

For a query q with score s_qj = <x_q, y_j>, and each positive i (a gallery row with the label of q),

    rank_all[q, i] = 1 + sum over j != i of sigmoid((s_qj - s_qi) / tau)
    rank_pos[q, i] = 1 + the same sum over positives j != i only

Smooth-AP (Brown et al., ECCV 2020, arXiv 2007.12163, eq. 7-9) is the mean of rank_pos / rank_all.

With slope_qij = sigmoid' = u (1 - u) / tau and upstream gradients a = d/d rank_all, b = d/d rank_pos,

    dS_qj += (a_qi + b_qi [j positive]) slope_qij,     dS_qi -= the sum of these over j     (rows of dS sum to 0)
    dX = dS Y, dY = dS^T X;   gallery = batch: dX = (dS + dS^T) X

Cost: N M G sigmoids forward and as many backward, for G positives a query. State kept for backward: the rows, O(N + M)
integers, and what the caller's formula keeps of rank_all and rank_pos: two floats a positive pair, nothing N x M.
Triton keeps a third: tau times the sum of slope_qij over negatives j, which depends on no upstream gradient. Forward
takes it in its sweep where a gradient may be wanted, and backward sweeps the gallery once less.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import rank_sums as reference
from fastret.backends.rows import accumulation_dtype, unit_rows
from fastret.backends.segments import Segments, label_segments
from fastret.ops import checks
from fastret.ops.library import apply, define, refuse


class RankSums(NamedTuple):
    """Soft ranks of P positive pairs, listed query by query, a query's positives in ascending gallery order.

    Attributes:
        rank_all, rank_pos: (P,) float32, or float64 for float64 rows.
        counts: (N,) int64, gallery rows with the label of each query; sums to P.
    """

    rank_all: Tensor
    rank_pos: Tensor
    counts: Tensor


def rank_sums(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    *,
    temperature: float | Tensor,
    exclude_self: bool = False,
    normalize: bool = True,
    samples_per_class: int | None = None,
    impl: str | None = None,
) -> RankSums:
    """Soft ranks of every positive of every query; formula, gradient and cost stand at the top of this file.

    Args:
        x: (N, D) queries.
        labels: (N,) integers, any values in any order.
        y: (M, D) gallery; None: the batch itself, the query included in its own list.
        y_labels: (M,) integers, given exactly when y is.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        exclude_self: gallery = batch only: q is neither positive nor competitor of itself. The pair (q, q) stays in the
            list with the constants rank_all = 1, rank_pos = 0.
        normalize: cosine scores; False: raw dot products.
        samples_per_class: every query has exactly this many positives in the gallery (itself counted). Spares CUDA the
            one synchronisation that the number of pairs costs, and makes shapes static.
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    checks.check_labels(labels, x, "labels")
    if (y is None) != (y_labels is None):
        raise ValueError("y, y_labels: expected both or neither")
    if y is not None and y_labels is not None:
        checks.check_rows(y, "y", like=x)
        checks.check_labels(y_labels, y, "y_labels")
        if exclude_self:
            raise ValueError(
                "exclude_self: expected False with a gallery of its own (nothing in it is the query itself)"
            )
        shared, label_type = torch.promote_types(x.dtype, y.dtype), torch.promote_types(labels.dtype, y_labels.dtype)
        x, y = x.to(shared), y.to(shared)
        labels, y_labels = labels.to(label_type), y_labels.to(label_type)
        # dynamo takes no tensor twice in one Function
        y, y_labels = (y.view_as(y) if y is x else y), (y_labels.view_as(y_labels) if y_labels is labels else y_labels)
    checks.check_positive(temperature, "temperature")
    checks.check_count(samples_per_class, "samples_per_class")
    chosen = registry.resolve("rank_sums", x.device, x.dtype, impl)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            ranks = reference.rank_sums(
                x, y, labels, y_labels, temperature=temperature, exclude_self=exclude_self, normalize=normalize
            )
        _, _, count = segments_of(labels, y_labels, samples_per_class)
        return RankSums(*ranks, count)
    if isinstance(temperature, Tensor):
        x, y = _scaled(x, y, temperature, normalize)
        temperature, normalize = 1.0, False
    slopes = checks.wants_gradient(x) or checks.wants_gradient(y)
    options = (float(temperature), exclude_self, normalize, slopes, chosen)
    rank_all, rank_pos, *_, count = apply(_RankSums, x, y, labels, y_labels, samples_per_class, *options)
    return RankSums(rank_all, rank_pos, count)


def sum_by_query(values: Tensor, counts: Tensor) -> Tensor:
    """(N,) sums of ``values`` (P,), one per positive pair, over the pairs of each query, ``counts`` (N,) of them."""
    result: Tensor = apply(_SumByQuery, values, counts)
    return result


def _scaled(x: Tensor, y: Tensor | None, temperature: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows whose dot products are the scores over tau: autograd then knows the gradient of tau."""

    def scale(rows: Tensor) -> Tensor:
        wide = rows.to(accumulation_dtype(rows.dtype))
        return (unit_rows(wide) if normalize else wide) * temperature.to(wide).rsqrt()

    return scale(x), None if y is None else scale(y)


def segments_of(
    labels: Tensor, y_labels: Tensor | None, samples_per_class: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """order, start, count of ``Segments``, class sizes checked against ``samples_per_class``."""
    s = label_segments(labels, y_labels)
    if samples_per_class is not None:
        right = (s.count == samples_per_class).all()
        message = f"samples_per_class: expected {samples_per_class} rows of each query's class in the gallery"
        if labels.device.type != "cpu":
            torch._assert_async(right, message)
        elif not right:
            wrong = s.count[s.count != samples_per_class]
            raise ValueError(f"{message}, got {int(wrong[0])}")
    return s.order, s.start, s.count


def _sums_slopes(impl: str) -> bool:
    """Whether an implementation's backward takes the slopes that its forward sums."""
    return hasattr(registry.IMPLEMENTATIONS[impl].module("rank_sums"), "SUMS_SLOPES")


def _forward(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor,
    y_labels: Tensor | None,
    samples_per_class: int | None,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    slopes: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, start, count = segments_of(labels, y_labels, samples_per_class)
    pairs = int(count.sum()) if samples_per_class is None else len(x) * samples_per_class
    wanted = {"slopes": slopes} if _sums_slopes(impl) else {}
    rank_all, rank_pos, *summed = (
        registry.IMPLEMENTATIONS[impl]
        .module("rank_sums")
        .forward(
            x,
            y,
            Segments(order, start, count),
            pairs,
            temperature=temperature,
            exclude_self=exclude_self,
            normalize=normalize,
            **wanted,
        )
    )
    return rank_all, rank_pos, summed[0] if summed else rank_all.new_empty(0), order, start, count


def _forward_fake(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor,
    y_labels: Tensor | None,
    samples_per_class: int | None,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    slopes: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, m = x.shape[0], x.shape[0] if y is None else y.shape[0]
    pairs = torch.library.get_ctx().new_dynamic_size() if samples_per_class is None else n * samples_per_class
    sizes = pairs, pairs, pairs if slopes and _sums_slopes(impl) else 0
    rank_all, rank_pos, summed = (x.new_empty(size, dtype=accumulation_dtype(x.dtype)) for size in sizes)
    order, start, count = (labels.new_empty(size, dtype=torch.int64) for size in (m, n, n))
    return rank_all, rank_pos, summed, order, start, count


def _backward(
    grad_all: Tensor,
    grad_pos: Tensor,
    x: Tensor,
    y: Tensor | None,
    slopes: Tensor,
    order: Tensor,
    start: Tensor,
    count: Tensor,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    summed = {"slopes": slopes} if _sums_slopes(impl) else {}
    if summed and slopes.shape != grad_all.shape:
        raise ValueError(f"slopes: expected those of {grad_all.numel()} pairs, which forward sums on request")
    dx, dy = (
        registry.IMPLEMENTATIONS[impl]
        .module("rank_sums")
        .backward(
            grad_all,
            grad_pos,
            x,
            y,
            Segments(order, start, count),
            temperature=temperature,
            exclude_self=exclude_self,
            normalize=normalize,
            need_x=need_x,
            need_y=need_y,
            **summed,
        )
    )
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing.clone() if dy is None else dy


def _backward_fake(
    grad_all: Tensor,
    grad_pos: Tensor,
    x: Tensor,
    y: Tensor | None,
    slopes: Tensor,
    order: Tensor,
    start: Tensor,
    count: Tensor,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(y.shape if y is not None and need_y else 0),
    )


define(
    "rank_sums(Tensor x, Tensor? y, Tensor labels, Tensor? y_labels, SymInt? samples_per_class, float temperature, "
    "bool exclude_self, bool normalize, bool slopes, str impl) -> (Tensor rank_all, Tensor rank_pos, Tensor summed, "
    "Tensor order, Tensor start, Tensor count)",
    _forward,
    _forward_fake,
)
define(
    "rank_sums_backward(Tensor grad_all, Tensor grad_pos, Tensor x, Tensor? y, Tensor slopes, Tensor order, "
    "Tensor start, Tensor count, float temperature, bool exclude_self, bool normalize, bool need_x, bool need_y, "
    "str impl) -> (Tensor dx, Tensor dy)",
    _backward,
    _backward_fake,
)


_forward_operator = torch.ops.fastret.rank_sums.default
_backward_operator = torch.ops.fastret.rank_sums_backward.default


class _RankSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor | None,
        labels: Tensor,
        y_labels: Tensor | None,
        samples_per_class: int | None,
        temperature: float,
        exclude_self: bool,
        normalize: bool,
        slopes: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:  # spelled out: without a gradient dynamo inlines this and miscounts *arguments
        result: tuple[Tensor, ...] = _forward_operator(
            x, y, labels, y_labels, samples_per_class, temperature, exclude_self, normalize, slopes, impl
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, _, _, _, temperature, exclude_self, normalize, _, impl = inputs
        _, _, slopes, order, start, count = output
        ctx.options, ctx.impl = (temperature, exclude_self, normalize), impl
        ctx.mark_non_differentiable(slopes, order, start, count)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros for each of them
        ctx.save_for_backward(x, y, slopes, order, start, count)

    @staticmethod
    def backward(ctx: Any, grad_all: Tensor | None, grad_pos: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        need_x, need_y = ctx.needs_input_grad[:2]
        if grad_all is None:
            if grad_pos is None:
                return (None,) * 10
            grad_all = torch.zeros_like(grad_pos)
        elif grad_pos is None:
            grad_pos = torch.zeros_like(grad_all)
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _RankSumsBackward.apply
        dx, dy = compute(grad_all, grad_pos, *ctx.saved_tensors, *ctx.options, need_x, need_y, ctx.impl)
        return dx if need_x else None, dy if need_y else None, *[None] * 8


class _RankSumsBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("rank_sums", "a second differentiation")


class _SumByQuery(torch.autograd.Function):
    """index_add whose backward needs N integers, not an index per pair."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, count: Tensor) -> Tensor:
        query = torch.repeat_interleave(count, output_size=values.shape[0])
        return values.new_zeros(count.shape).index_add(0, query, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, count = inputs
        ctx.pairs = values.shape[0]
        ctx.save_for_backward(count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (count,) = ctx.saved_tensors
        return grad.repeat_interleave(count, output_size=ctx.pairs), None
