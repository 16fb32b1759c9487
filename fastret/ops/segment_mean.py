"""segment_mean: means, or sums, of rows by integer segment.

    sum_s = sum over i with index_i = s of x_i,     n_s = how many those are,     mean_s = sum_s / n_s

A row with a negative index belongs nowhere: it is not counted, and its gradient is 0. A segment without rows has sum
and mean 0. Sums are taken in float64, rows in ascending order, and rounded once: neither the number of rows of a
segment nor, on the CPU, that of threads is seen in a result, and no implementation adds by atomics.

    dx_i = g_s / n_s (g_s for sums), s = index_i

Cost: one reading of x. Memory: O(N + S) numbers for the order of the rows. Kept for backward: index and n, not x.

The interface of an implementation, ``fastret.backends.*.segment_mean``:

    forward(x, index, segments, *, mean) -> (result, counts)
    backward(grad, index, counts, *, mean, dtype) -> dx

with x (N, D) of a floating dtype; index (N,) int64 below ``segments``; result (S, D) float32, or float64 for float64
rows; counts (S,) int64; grad like result; dx (N, D) of ``dtype``.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import segment_mean as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.library import apply, define

REDUCTIONS = ("mean", "sum")


def segment_mean(
    x: Tensor, index: Tensor, num_segments: int, *, reduce: str = "mean", impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Means of rows by segment; formula, what is promised of sums, gradient and cost stand at the top of this file.

    Args:
        x: (N, D) rows.
        index: (N,) integers below ``num_segments``; negative: the row belongs to no segment.
        num_segments: S, at least 0.
        reduce: "mean" or "sum".
        impl: "reference", "tiled" or "cpu"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        (result, counts): (S, D) float32, or float64 where x is; (S,) int64 rows of each segment.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    checks.check_labels(index, x, "index")
    checks.check_integer(num_segments, "num_segments", 0)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    index = index.to(torch.int64)
    chosen = registry.resolve("segment_mean", x.device, x.dtype, impl)
    if chosen == "reference":
        checks.check_range(index, num_segments, "index", negative=True)
        with torch.autocast(x.device.type, enabled=False):
            return reference.segment_mean(x, index, num_segments, mean=reduce == "mean")
    result, counts = apply(_SegmentMean, x, index, num_segments, reduce == "mean", chosen)
    return result, counts


def _forward(x: Tensor, index: Tensor, segments: int, mean: bool, impl: str) -> tuple[Tensor, Tensor]:
    checks.check_range(index, segments, "index", negative=True)
    result, counts = registry.IMPLEMENTATIONS[impl].module("segment_mean").forward(x, index, segments, mean=mean)
    return result, counts


def _forward_fake(x: Tensor, index: Tensor, segments: int, *_: Any) -> tuple[Tensor, Tensor]:
    result = x.new_empty(segments, x.shape[1], dtype=accumulation_dtype(x.dtype))
    return result, index.new_empty(segments)


def _backward(grad: Tensor, index: Tensor, counts: Tensor, mean: bool, dtype: torch.dtype, impl: str) -> Tensor:
    module = registry.IMPLEMENTATIONS[impl].module("segment_mean")
    dx: Tensor = module.backward(grad, index, counts, mean=mean, dtype=dtype)
    return dx


def _backward_fake(grad: Tensor, index: Tensor, counts: Tensor, mean: bool, dtype: torch.dtype, impl: str) -> Tensor:
    return grad.new_empty(index.shape[0], grad.shape[1], dtype=dtype)


define(
    "segment_mean(Tensor x, Tensor index, SymInt segments, bool mean, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "segment_mean_backward(Tensor grad, Tensor index, Tensor counts, bool mean, ScalarType dtype, str impl) -> Tensor",
    _backward,
    _backward_fake,
)

_forward_operator = torch.ops.fastret.segment_mean.default
_backward_operator = torch.ops.fastret.segment_mean_backward.default


class _SegmentMean(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, segments: int, mean: bool, impl: str) -> Any:
        return _forward_operator(x, index, segments, mean, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, index, _, ctx.mean, ctx.impl = inputs
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(index, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _SegmentMeanBackward.apply
        return compute(grad, *ctx.saved_tensors, ctx.mean, ctx.dtype, ctx.impl), *[None] * 4


class _SegmentMeanBackward(torch.autograd.Function):
    """Linear in the gradient: its own gradient is the op again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, index, _, ctx.mean, _, ctx.impl = inputs
        ctx.segments = grad.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        result, _ = _SegmentMean.apply(grad, index, ctx.segments, ctx.mean, ctx.impl)
        return result, *[None] * 5
