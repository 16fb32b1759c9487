"""masked_lse in C++ (csrc/cpu/masked_lse.cpp, masked_lse_sweep.cpp). Serves every head: there is nothing to fall back
from. All heads share a product of rows, of which narrower feature widths (Matryoshka) see prefix sums; rows whose first
features are next to nothing have a product a width instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastret import _C
from fastret.backends import phi
from fastret.backends.centers import Centers
from fastret.backends.cpu.array import ArrayTuple, array, rows_of
from fastret.backends.pairs import (
    Circulant,
    Dense,
    Gradients,
    Head,
    Indexed,
    Listed,
    Masked,
    Need,
    PairMask,
    Shifted,
    Target,
)
from fastret.backends.rows import NORM_EPS, accumulation_dtype

_Prefixes = list[tuple[int, Tensor | None]]  # gradients of so many features
_Parameters = tuple[Tensor | None, Tensor | None, Tensor | None]  # of scale, row bias, column bias

REDUCTIONS = ("lse", *phi.NAMES)  # in the order of csrc/cpu/masked_lse.h
_UNEVEN = 1e6  # norm of a row over that of its first features

_NO_MASK: "_C.MaskTuple" = (None, None, None, None, 0, None, None)


def _centers(centers: Centers | None) -> tuple[int, float]:
    return (1, 0.0) if centers is None else (centers.count, centers.temperature or 0.0)


def _array(t: Tensor | None) -> ArrayTuple | None:
    return None if t is None else array(t)


def _arrays(gradients: _Parameters) -> "_C.ParameterTuple":
    scale, row_bias, column_bias = gradients
    return _array(scale), _array(row_bias), _array(column_bias)


def _relation(labels: tuple[Tensor, Tensor] | None) -> tuple[ArrayTuple, ArrayTuple] | None:
    return None if labels is None else (array(labels[0]), array(labels[1]))


def mask_tuple(m: PairMask) -> "_C.MaskTuple":
    relations = (_relation(m.same), _relation(m.different), _relation(m.distinct))
    return *relations, m.offset, m.period or 0, _array(m.above), _array(m.below)


def _target(target: Target | None, smoothing: float, columns: int) -> "_C.TargetTuple":
    """The kinds of csrc/cpu/masked_lse.h: 0 none, 1 indexed, 2 shifted, 3 masked, 4 dense, 5 listed."""
    kind, index, offsets, weight, dense, mask = 0, None, None, None, None, _NO_MASK
    shifts: list[int] = []
    weights: list[float] = []
    base = period = 0
    match target:
        case Indexed():
            kind, index = 1, array(target.index)
        case Shifted():
            kind, shifts, weights, period = 2, [target.offset], [1.0], target.period or 0
        case Circulant():
            kind, shifts, weights, period = 2, list(target.shifts), list(target.weights), target.period
            base = target.offset
        case Masked():
            kind, mask, weight = 3, mask_tuple(target.mask), array(target.weight)
        case Dense():
            kind, dense = 4, array(target.weights)
        case Listed():
            kind, offsets, index, weight = 5, array(target.offsets), array(target.index), array(target.weight)
    uniform = smoothing / columns if smoothing else 0.0
    return kind, index, offsets, shifts, weights, base, period, mask, weight, dense, 1 - smoothing, uniform


def _head(h: Head, columns: int) -> "_C.HeadTuple":
    target = _target(h.target, h.smoothing, columns)
    biases = _array(h.row_bias), _array(h.column_bias)
    return float(h.scale), h.axis == "column", mask_tuple(h.mask), target, *biases, REDUCTIONS.index(h.reduce)


def _ascending(h: Head) -> Head:
    """A list of targets by index within each row: those of a tile's columns are then found by search."""
    goal = h.target
    if not isinstance(goal, Listed):
        return h
    row = torch.repeat_interleave(goal.offsets.diff(), output_size=goal.index.shape[0])
    if not ((goal.index.diff() < 0) & (row.diff() == 0)).any():
        return h
    order = goal.index.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    return replace(h, target=Listed(goal.offsets, goal.index[order], goal.weight[order]))


@dataclass(frozen=True)
class _Share:
    """Heads that share a product of the first ``width`` features, in the order of ``levels``: (width, heads) each."""

    width: int
    places: list[int]
    levels: list[tuple[int, int]]


def _shares(x: Tensor, y: Tensor | None, heads: Sequence[Head], normalize: bool) -> list[_Share]:
    """Alike in forward and backward, so that masks by score are."""
    widths = [h.width or x.shape[1] for h in heads]
    levels = sorted(set(widths))
    by_level = [[k for k, w in enumerate(widths) if w == width] for width in levels]
    counts = [(width, len(places)) for width, places in zip(levels, by_level, strict=True)]
    sides = (x,) if y is None else (x, y)
    if len(levels) > 1 and normalize and not all(_are_even(rows, levels[0], levels[-1]) for rows in sides):
        return [_Share(level[0], places, [level]) for level, places in zip(counts, by_level, strict=True)]
    return [_Share(levels[-1], [k for places in by_level for k in places], counts)]


def _see_all(shares: Sequence[_Share], x: Tensor) -> bool:
    """Whether there is one product, of all features."""
    return len(shares) == 1 and shares[0].width == x.shape[1]


def _are_even(rows: Tensor, narrow: int, wide: int) -> bool:
    """Whether the narrowest prefix of every row (``narrow`` features) is not far shorter than the widest.

    Products of rows of unit norm have those of their prefixes as parts, down to 1 / _UNEVEN^2 of the prefixes' own
    scores, and slopes up to _UNEVEN^2 of their own: 1e12 is far from where float32 ends, 1e38 either way. A prefix of
    zeros counts as one of NORM_EPS. Norms that overflow here are left to the other way.
    """
    dtype = accumulation_dtype(rows.dtype)
    short, long = (
        torch.linalg.vector_norm(rows[:, :width], dim=1, dtype=dtype).clamp_min(NORM_EPS) for width in (narrow, wide)
    )
    return bool((long / short <= _UNEVEN).all())


def _is_finite(x: Tensor, y: Tensor | None) -> bool:
    return all(_sees_only_numbers(rows) for rows in ((x,) if y is None else (x, y)))


def _sees_only_numbers(rows: Tensor) -> bool:
    """A sum is read at the speed of memory, and finite but where an element is not, or where it overflows."""
    return math.isfinite(rows.sum()) or bool(rows.isfinite().all())


def _width_of(rows: Tensor | None, width: int) -> Tensor | None:
    return None if rows is None else rows_of(rows[:, :width])


def forward(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    centers: Centers | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head, as backends/reference defines them."""
    heads = [_ascending(h) for h in heads]
    group, temperature = _centers(centers)
    sizes = {"row": len(x), "column": len(x if y is None else y) // group}
    lses = [torch.empty(sizes[h.axis], dtype=accumulation_dtype(x.dtype)) for h in heads]
    results = [(lse, torch.empty_like(lse)) for lse in lses]
    shares = _shares(x, y, heads, normalize)
    for share in shares:
        rows, others = rows_of(x[:, : share.width]), _width_of(y, share.width)
        described = [_head(heads[k], columns) for k in share.places]
        outputs = [(array(results[k][0]), array(results[k][1])) for k in share.places]
        problem = (array(rows), _array(others), described, share.levels, normalize, first_column)
        _C.masked_lse_forward(*problem, torch.get_num_threads(), outputs, (group, temperature))
    if not _is_finite(x, y):  # a masked pair shows nothing
        results = [(torch.full_like(lse, torch.nan), torch.full_like(t, torch.nan)) for lse, t in results]
    return results


def backward(
    grads: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    lses: Sequence[Tensor],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    need: Need,
    centers: Centers | None = None,
) -> Gradients:
    """Gradients from those of each head's lse and t."""
    grads = [(g.contiguous(), h.contiguous()) for g, h in grads]
    lses = [lse.contiguous() for lse in lses]
    heads = [_ascending(h) for h in heads]
    parameters = [_parameter_gradients(h, need) for h in heads]
    shares = _shares(x, y, heads, normalize)
    whole = _see_all(shares, x)  # else sums of several products, rounded once
    dxs: _Prefixes = []
    dys: _Prefixes = []
    for share in shares:
        rows, others = rows_of(x[:, : share.width]), _width_of(y, share.width)
        dx, dy = _side_gradients(rows, others, need, x.dtype if whole else accumulation_dtype(x.dtype))
        described = [_head(heads[k], columns) for k in share.places]
        upstream = [(array(lses[k]), array(grads[k][0]), array(grads[k][1])) for k in share.places]
        outputs = [_arrays(parameters[k]) for k in share.places]
        problem = (array(rows), _array(others), described, share.levels, normalize, first_column)
        sides = _array(dx), _array(dy)
        _C.masked_lse_backward(*problem, torch.get_num_threads(), upstream, *sides, outputs, _centers(centers))
        dxs.append((share.width, dx))
        dys.append((share.width, dy))
    scale, row_bias, column_bias = (list(g) for g in zip(*parameters, strict=True))
    return Gradients(_summed(x, dxs, x.dtype), _summed(y, dys, x.dtype), scale, row_bias, column_bias)


def sweep(
    x: Tensor,
    y: Tensor | None,
    head: Head,
    row_weight: Tensor,
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    need: Need,
    centers: Centers | None = None,
) -> tuple[Tensor, Gradients]:
    """Sum of row_weight_i (lse_i - t_i) and its gradients, in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    row_weight, head = row_weight.contiguous(), _ascending(head)
    lse, t = torch.empty(len(x), dtype=dtype), torch.empty(len(x), dtype=dtype)
    parameters = _parameter_gradients(head, need)
    width = head.width or x.shape[1]
    rows, others = rows_of(x[:, :width]), _width_of(y, width)
    dx, dy = _side_gradients(rows, others, need, dtype)
    _C.masked_lse_sweep(
        array(rows),
        _array(others),
        _head(head, columns),
        normalize,
        first_column,
        torch.get_num_threads(),
        array(row_weight),
        array(lse),
        array(t),
        _array(dx),
        _array(dy),
        _arrays(parameters),
        _centers(centers),
    )
    empty = (row_weight == 0) & (lse == -torch.inf)
    value = (row_weight * torch.where(empty, 0, lse - t)).sum()
    if len(x) and not _is_finite(x, y):
        value = torch.full_like(value, torch.nan)
    scale, row_bias, column_bias = ([p] for p in parameters)
    dx, dy = _summed(x, [(width, dx)], dtype), _summed(y, [(width, dy)], dtype)
    return value, Gradients(dx, dy, scale, row_bias, column_bias)


def _parameter_gradients(h: Head, need: Need) -> _Parameters:
    """Memory for the gradients of scale, row bias and column bias, where the head has such tensors."""
    scale = h.scale if need.scale and isinstance(h.scale, Tensor) else None
    row_bias, column_bias = h.row_bias if need.row_bias else None, h.column_bias if need.column_bias else None
    return _empty(scale), _empty(row_bias), _empty(column_bias)


def _empty(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty_like(t)


def _side_gradients(x: Tensor, y: Tensor | None, need: Need, dtype: torch.dtype) -> list[Tensor | None]:
    wanted = ((x, need.x), (y, need.y))
    return [torch.empty(rows.shape, dtype=dtype) if rows is not None and w else None for rows, w in wanted]


def _summed(rows: Tensor | None, parts: _Prefixes, dtype: torch.dtype) -> Tensor | None:
    """Gradient of the rows from those of their prefixes of so many features."""
    given = [(width, part) for width, part in parts if part is not None]
    if rows is None or not given:
        return None
    if len(given) == 1 and given[0][0] == rows.shape[1]:
        return given[0][1].to(dtype)
    total = torch.zeros(rows.shape, dtype=accumulation_dtype(rows.dtype))
    for width, part in given:
        total[:, :width] += part
    return total.to(dtype)
