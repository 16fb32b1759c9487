"""center_distances: for each class, the sum of the distances of its centres on the unit sphere,

    r_c = sum over t > s of |u_s - u_t|,      u the unit rows c K .. c K + K - 1 of w,      |u_s - u_t|^2 = 2 - 2 cos

which SoftTriple's regulariser makes small. du_s = g_c sum over t of (u_s - u_t) / |u_s - u_t|, where coinciding rows
count nothing. Cost: C K^2 D in each direction. Kept for backward: w. Memory: tiles of K x K for a few classes.

The interface of an implementation, ``fastret.backends.tiled.center_distances`` (no device has a faster one):

    forward(w, centers) -> Tensor                  (C,) in the accumulation dtype
    backward(grad, w, centers) -> Tensor           of the shape and dtype of w
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends.reference import center_distances as reference
from fastret.backends.rows import accumulation_dtype
from fastret.backends.tiled import center_distances as tiled
from fastret.ops import checks
from fastret.ops.library import define, refuse


def center_distances(w: Tensor, centers: int, *, impl: str | None = None) -> Tensor:
    """(C,) sums of distances; formula and cost stand at the top of this file.

    Args:
        w: (C K, D) rows of any length.
        centers: K >= 1.
        impl: "reference": all at once; every other: in tiles.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(w, "w")
    checks.check_centers(w, centers, "w")
    if impl == "reference":
        with torch.autocast(w.device.type, enabled=False):
            return reference.center_distances(w, centers)
    sums: Tensor = _CenterDistances.apply(w, centers)
    return sums


def _forward_fake(w: Tensor, centers: int) -> Tensor:
    return w.new_empty(w.shape[0] // centers, dtype=accumulation_dtype(w.dtype))


def _backward_fake(grad: Tensor, w: Tensor, centers: int) -> Tensor:
    return w.new_empty(w.shape)


define("center_distances(Tensor w, SymInt centers) -> Tensor", tiled.forward, _forward_fake)
define("center_distances_backward(Tensor grad, Tensor w, SymInt centers) -> Tensor", tiled.backward, _backward_fake)

_forward_operator = torch.ops.fastret.center_distances.default
_backward_operator = torch.ops.fastret.center_distances_backward.default


class _CenterDistances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, centers: int) -> Any:
        return _forward_operator(w, centers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, ctx.centers = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _CenterDistancesBackward.apply
        return compute(grad, w, ctx.centers), None


class _CenterDistancesBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    backward = refuse("center_distances", "a second differentiation")
