"""topk: the k best columns of every row of a pair matrix that is never stored; exact.

    cosine  s_ij = <x_i, y_j> / (|x_i| |y_j|)       the greatest first
    dot     s_ij = <x_i, y_j>                       the greatest first
    l2      s_ij = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j> the least first: squared distances, 0 where rounding is below

Of equal scores the lower column comes first, and is kept. A row with fewer than k candidates is filled with the worst
score (-inf, l2: +inf) and index -1. A pair whose score is NaN, or the worst, is no candidate; so a row of x with NaN
finds nothing, and a row of y with NaN is never found.

What is promised of the order: it is exactly that of the scores returned, on every implementation. Implementations (and
tiles of another shape, where BLAS multiplies) may differ in the last bits of a score, and there columns whose scores
are that close may change places. fastret's own micro-kernel gives equal rows equal bits wherever they stand: there
copies of a row tie exactly, and pieces of the columns merge into what one call returns, bit for bit.

Results carry no gradient; ``pair_dot`` of (row, index) pairs has one.

Cost: N M D products and a comparison a score; a row's candidates are selected O(log M) times. Memory: O(N k) results
and a tile a thread with its rows' candidates, O(k) each; columns are converted and normalised while a tile is packed.

The interface of an implementation, ``fastret.backends.*.topk``:

    forward(x, y, k, mask, *, metric, first_column) -> tuple[Tensor, Tensor]

with x (N, D), y (M, D) of floating dtypes, which may differ where neither is float64; k >= 1; mask as ``masked_lse``
has it; scores (N, k) float32, or float64 for float64 rows; indices (N, k) int64.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.backends.reference import topk as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.heads import check_heads, flatten, restore
from fastret.ops.library import define, loop_under_vmap

METRICS = ("cosine", "dot", "l2")
LONG = 2048  # more results a row are the option "long", which not every implementation has


def topk(
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int,
    metric: str = "cosine",
    mask: PairMask | None = None,
    first_column: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best of every row; formulas, ties and what is no candidate stand at the top of this file.

    Args:
        x: (N, D) rows.
        y: (M, D) columns; None: x itself (``PairMask(offset=0)`` leaves each row out of its own result). Its dtype may
            differ from that of x: a bfloat16 or float16 gallery is searched without a copy in float32.
        k: number of results a row, at least 1; more than there are candidates is allowed.
        metric: "cosine", "dot" or "l2".
        mask: pairs that are candidates; None: all. Its thresholds are of s_ij, which for l2 are squared distances.
        first_column: y is a piece of a larger matrix and its first row has this number there; indices count from there.
            The k best of the pieces' results are those of the whole.
        impl: "reference", "tiled", "cpu" or "cuda" (k up to 2048, no float64); None: ``fastret.backend``, FASTRET_IMPL,
            else the fastest.

    Returns:
        (scores, indices), both (N, k), best first; float32, or float64 where x or y is; int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: impl="cuda" with k beyond 2048.
    """
    x, y = _checked(x, y, k, metric, first_column)
    mask = PairMask() if mask is None else mask
    check_heads([Head(mask=mask)], x, y.shape[0])
    chosen = registry.resolve("topk", x.device, x.dtype, impl, ("long",) if k > LONG else ())
    if chosen == "reference":
        return reference.forward(x, y, k, mask, metric=metric, first_column=first_column)
    flat = flatten([Head(mask=mask)], accumulation_dtype(x.dtype))
    scores, indices = _operator(
        x, y, k, flat.tensors, flat.numbers, flat.factors, flat.spec, metric, first_column, chosen
    )
    return scores, indices


def _checked(x: Tensor, y: Tensor | None, k: int, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """x and y, both float64 where one is."""
    checks.check_rows(x, "x")
    if y is None:
        y = x
    else:
        checks.check_rows(y, "y", like=x)
    if k is None:
        raise TypeError("k: expected an integer, got NoneType")
    checks.check_count(k, "k")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if first_column < 0:
        raise ValueError(f"first_column: expected at least 0, got {first_column}")
    x, y = x.detach(), y.detach()
    if torch.float64 in (x.dtype, y.dtype):
        x, y = x.double(), y.double()
    return x, y


def _forward(
    x: Tensor,
    y: Tensor,
    k: int,
    tensors: list[Tensor],
    numbers: list[int],
    factors: list[float],
    spec: str,
    metric: str,
    first_column: int,
    impl: str,
) -> list[Tensor]:
    (head,) = restore(spec, None, None, None, tensors, numbers, factors)
    module = registry.IMPLEMENTATIONS[impl].module("topk")
    return list(module.forward(x, y, k, head.mask, metric=metric, first_column=first_column))


def _forward_fake(x: Tensor, y: Tensor, k: int, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], k, dtype=dtype) for dtype in (accumulation_dtype(x.dtype), torch.int64)]


define(
    "topk(Tensor x, Tensor y, SymInt k, Tensor[] tensors, SymInt[] numbers, float[] factors, str spec, str metric, "
    "SymInt first_column, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
loop_under_vmap("topk")

_operator = torch.ops.fastret.topk.default
