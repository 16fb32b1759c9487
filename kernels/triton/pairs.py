"""Pair functions: which pairs (i, j) a head allows, which are its targets, what their logits weigh.

The arguments of a head stand in nested tuples. What a head does not have is None, so that a kernel is compiled without
it and it costs nothing. (Triton 3.6 can neither compare a tuple that holds None with None nor take its length.) Every
function takes the rows i and the columns j of a tile of scores as tensors that broadcast to its shape, (A, 1) and
(1, B) or (1, B) and (A, 1): a tile may lie either way round, and a program may own rows or columns. Forward and
backward call the same functions.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastret.kernels.triton.pairwise import exponential
from fastret.kernels.triton.phi import phi_slope


class Mask(NamedTuple):
    """``PairMask``: relations as pointers (of rows, of columns), numbers, bounds as pointers. offset < period."""

    same: Any = None
    different: Any = None
    distinct: Any = None
    offset: Any = None
    period: Any = None
    above: Any = None
    below: Any = None


class Target(NamedTuple):
    """One of: index; weight of rows for the pairs of a mask; dense (N, columns); shifts; offsets with entries.

    Entries: indices and weights, of which those from offsets i to i + 1 are row i's.
    Shifts: column base + (i + shift), modulo the period where there is one, has the weight of the shift; 1 where
    ``shift_weights`` is None.
    """

    index: Any = None
    mask: Any = None
    weight: Any = None
    dense: Any = None
    columns: Any = None
    shifts: Any = ()
    shift_weights: Any = None
    base: Any = None
    period: Any = None
    offsets: Any = None
    entries: Any = None


class Head(NamedTuple):
    """``Head``: scale, biases and upstream gradients as pointers; axis, a constexpr: "row" or "column".

    Y is keep times the target plus uniform, where those are given; scored, a constexpr: whether it is anything but 0.
    reduce, a constexpr: "lse" or the name of a phi, whose sum then takes the place of the lse. lse and its and the
    target score's upstream gradient are those of backward, one per row or column by the axis. norms: of columns that
    lie in memory as they are; the same for all heads of a launch.
    """

    scale: Any
    row_bias: Any
    column_bias: Any
    mask: Any
    target: Any
    keep: Any
    uniform: Any
    scored: Any
    axis: Any
    reduce: Any
    lse: Any = None
    grad_lse: Any = None
    grad_target: Any = None
    norms: Any = None


@triton.jit
def place(i, shift, period):
    """i + shift, modulo the period where there is one."""
    moved = i.to(tl.int64) + shift
    if period is not None:
        moved = moved % period
    return moved


@triton.jit
def here(column, first_column):
    """Column numbers of the whole matrix among those that begin at ``first_column``, as int32: a line of a tile is
    compared with each, in half the registers. -1, or beyond the last, where they are elsewhere."""
    return tl.minimum(tl.maximum(column.to(tl.int64) - first_column, -1), 2147483647).to(tl.int32)


@triton.jit
def allowed(mask, s, i, j, first_column, valid):
    """Which of the ``valid`` pairs meet every condition. ``s``: their unscaled scores."""
    ok = valid
    if mask.same is not None:
        ok = ok & (tl.load(mask.same[0] + i) == tl.load(mask.same[1] + j))
    if mask.different is not None:
        ok = ok & (tl.load(mask.different[0] + i) != tl.load(mask.different[1] + j))
    if mask.distinct is not None:
        ok = ok & (tl.load(mask.distinct[0] + i) != tl.load(mask.distinct[1] + j))
    if mask.offset is not None:
        ok = ok & (j != here(place(i, mask.offset, mask.period), first_column))
    if mask.above is not None:
        ok = ok & (s > tl.load(mask.above + i))
    if mask.below is not None:
        ok = ok & (s < tl.load(mask.below + i))
    return ok


@triton.jit
def over_norms(head, t, j):
    """A tile over the norms of its columns j where the head has any: scores of rows as they are become those of unit
    rows, and weights of unit rows those of rows as they are."""
    if head.norms is not None:
        t = t * (1.0 / tl.load(head.norms + j))
    return t


@triton.jit
def logits(head, s, i, j):
    """scale s_ij + a_i + b_j."""
    z = s * tl.load(head.scale)
    if head.row_bias is not None:
        z += tl.load(head.row_bias + i)
    if head.column_bias is not None:
        z += tl.load(head.column_bias + j)
    return z


@triton.jit
def listed_weights(target, i, j, first_column, like):
    """Sums of the weights of entries of rows i for columns j: one comparison of the tile for each entry of the row that
    has most of them."""
    begin = tl.load(target.offsets + i)
    count = tl.load(target.offsets + i + 1) - begin
    y = tl.zeros_like(like)
    for k in range(0, tl.max(count)):
        exists = k < count
        index = tl.load(target.entries[0] + begin + k, mask=exists, other=-1)
        weight = tl.load(target.entries[1] + begin + k, mask=exists, other=0.0)
        y += tl.where(j == here(index, first_column), weight, 0.0)
    return y


@triton.jit
def target_weights(head, s, i, j, first_column, valid):
    """Y_ij, smoothed; to be read where ``valid``."""
    target = head.target
    y = tl.zeros_like(s)
    if target.index is not None:
        y += (j == here(tl.load(target.index + i), first_column)).to(s.dtype)
    if target.weight is not None:
        ok = allowed(target.mask, s, i, j, first_column, valid)
        y += tl.where(ok, tl.load(target.weight + i), 0.0)
    if target.dense is not None:
        y += tl.load(target.dense + i.to(tl.int64) * target.columns + j)
    for d in tl.static_range(len(target.shifts)):
        column = place(i, target.shifts[d], target.period)
        if target.base is not None:
            column += target.base
        hit = (j == here(column, first_column)).to(s.dtype)
        if target.shift_weights is not None:
            hit = hit * tl.load(target.shift_weights[d])
        y += hit
    if target.offsets is not None:
        y += listed_weights(target, i, j, first_column, y)
    if head.keep is not None:
        y = y * tl.load(head.keep) + tl.load(head.uniform)
    return y


@triton.jit
def pair_weights(head, s, i, j, first_column, valid):
    """W_ij = g P_ij + h Y_ij, 0 where not ``valid``: the gradient of the logits. P is phi' where a phi is summed."""
    line = i if head.axis == "row" else j
    z = logits(head, s, i, j)
    grad = tl.load(head.grad_lse + line)
    if head.reduce == "lse":
        lse = tl.load(head.lse + line)
        empty = lse == float("-inf")  # has no gradient through lse, whatever g is
        p = exponential(z - tl.where(empty, 0.0, lse))
        grad = tl.where(empty, 0.0, grad)
    else:
        p = phi_slope(head.reduce, z)
    ok = allowed(head.mask, s, i, j, first_column, valid)
    w = tl.where(ok, p * grad, 0.0)
    if head.scored:
        y = target_weights(head, s, i, j, first_column, valid)
        w += tl.where(valid, y * tl.load(head.grad_target + line), 0.0)
    return w
