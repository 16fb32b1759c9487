"""center_distances: for each class, the sum of the distances of its centres on the unit sphere,

    r_c = sum over t > s of |u_s - u_t|,      u the unit rows c K .. c K + K - 1 of w,      |u_s - u_t|^2 = 2 - 2 cos

which SoftTriple's regulariser makes small. du_s = g_c sum over t of (u_s - u_t) / |u_s - u_t|, where coinciding rows
count nothing. Cost: C K^2 D in each direction. Kept for backward: w. Memory: tiles of K x K for a few classes.

The centres also go into a reduction, and w would have two dense gradients at a time. So the rows pass through this op,
and it adds its gradient to theirs.

The interface of an implementation, ``fastret.backends.tiled.center_distances`` (no device has a faster one):

    forward(w, centers) -> Tensor                       (C,) in the accumulation dtype
    add_gradient(dw, grad, w, centers) -> None          onto dw, of the shape and dtype of w
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends.reference import center_distances as reference
from fastret.backends.rows import accumulation_dtype
from fastret.backends.tiled import center_distances as tiled
from fastret.ops import checks
from fastret.ops.library import apply, define, refuse


def center_distances(w: Tensor, centers: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """(C,) sums of distances; formula and cost stand at the top of this file.

    Args:
        w: (C K, D) rows of any length.
        centers: K >= 1.
        impl: "reference": all at once; every other: in tiles.

    Returns:
        w again, and the sums. What is done with the rows is to be done with this w, by one function that makes its
        gradient anew, as the ops of fastret do: backward adds to that gradient in place.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(w, "w")
    checks.check_centers(w, centers, "w")
    if impl == "reference":
        with torch.autocast(w.device.type, enabled=False):
            return w, reference.center_distances(w, centers)
    rows, sums = apply(_CenterDistances, w, centers)
    return rows, sums


def _forward_fake(w: Tensor, centers: int) -> Tensor:
    return w.new_empty(w.shape[0] // centers, dtype=accumulation_dtype(w.dtype))


def _backward(dw: Tensor, grad: Tensor, w: Tensor, centers: int) -> Tensor:
    result = dw.clone(memory_format=torch.contiguous_format)
    tiled.add_gradient(result, grad, w, centers)
    return result


def _backward_fake(dw: Tensor, grad: Tensor, w: Tensor, centers: int) -> Tensor:
    return w.new_empty(w.shape)


define("center_distances(Tensor w, SymInt centers) -> Tensor", tiled.forward, _forward_fake)
define(
    "center_distances_backward(Tensor dw, Tensor grad, Tensor w, SymInt centers) -> Tensor", _backward, _backward_fake
)

_forward_operator = torch.ops.fastret.center_distances.default
_backward_operator = torch.ops.fastret.center_distances_backward.default


class _CenterDistances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, centers: int) -> Any:
        return w.view_as(w), _forward_operator(w, centers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        w, ctx.centers = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, dw: Tensor, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        if torch.compiler.is_compiling():
            return _backward_operator(dw, grad, w, ctx.centers), None
        if torch.is_grad_enabled() or not dw.is_contiguous():  # a graph, or torch.func, may hold on to dw
            return _CenterDistancesBackward.apply(dw, grad, w, ctx.centers), None
        with torch._C._DisableAutocast():
            tiled.add_gradient(dw, grad, w, ctx.centers)
        return dw, None


class _CenterDistancesBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = refuse("center_distances", "a second differentiation")
