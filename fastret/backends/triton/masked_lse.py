"""masked_lse by the kernels of kernels/triton/masked_lse.py: normalises and lays out the rows, launches, adds parts.

Forward multiplies the rows once for two heads of a feature width, or for each where they are heavy or listed; backward
once for two, and once more for the columns of a gallery; ``sweep`` does both with rows that are laid out once. Nothing
here waits for the device: launch grids follow from shapes alone, and CUDA graphs can capture every call. Memory beyond
inputs and outputs: rows in their own dtype, but for columns that are many and lie as the kernels want them, which are
read there; gradients of rows in the dtype of accumulation; O(N + M) for each head; where sums are divided into parts, a
copy of them for each. Up to FASTRET_WORKSPACE: a block of weights or scores where the plan stores them; and in forward
of two heads over either side, fused too, tables (blocks of rows, M) of lse and t, or a row of them where that is more.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import Block, Gradients, Head, Listed, Need
from fastret.backends.registry import Call
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import masked_lse_blocks
from fastret.backends.triton.heads import Upstream, arguments, by_threshold, conditions, part
from fastret.backends.triton.plans import Strips, plan_for
from fastret.backends.triton.rows import (
    PackedRows,
    in_place,
    lies_packed,
    look,
    merging,
    nothing_yet,
    pack_padded,
    padded,
    total,
)
from fastret.backends.workspace import workspace
from fastret.kernels.triton import config, pairs
from fastret.kernels.triton import masked_lse as kernels

HEADS = 2  # that share a product of rows: what registers hold, with all their conditions
TABLES = 4  # of a head across, for every block of lines: lse, t, and what merging them takes
CONDITIONS = 6  # that two heads may have for the larger tiles
FEW = 2  # columns a row, up to which they are copied


@dataclass(frozen=True)
class _Sums:
    """What one launch of the gradient kernel returns: of the rows it owns, where wanted, in parts; sums (heads, n)."""

    rows: Tensor | None
    of_rows: Tensor | None
    of_columns: Tensor | None
    of_scores: Tensor | None


@dataclass(frozen=True)
class _Problem:
    """The rows of one feature width and one or two heads that have it.

    Attributes:
        x, y: packed rows (N, width) and columns (M, width), which may be raw; the same object where y is None.
        heads: those of this width.
        places: where they stand among all.
        heavy: they take tiles of their own: their conditions are many, or compare scores with thresholds. Scores are
            then the same bits in every launch.
    """

    x: PackedRows
    y: PackedRows
    heads: list[Head]
    places: list[int]
    heavy: bool
    first_column: int
    columns: int

    @property
    def width(self) -> int:
        """Of the features and their padding."""
        return padded(self.x.rows.shape[1])

    def sides(self, axis: str) -> tuple[Tensor, Tensor]:
        """The rows that belong to the results, and the other ones."""
        return (self.x.rows, self.y.rows) if axis == "row" else (self.y.rows, self.x.rows)

    @functools.cached_property
    def arguments(self) -> tuple[pairs.Head, ...]:
        """The heads as the kernels take them."""
        like = torch.empty((), dtype=accumulation_dtype(self.x.rows.dtype), device=self.x.rows.device)
        return tuple(arguments(head, like, self.columns, norms=self.norms) for head in self.heads)

    @property
    def norms(self) -> Tensor | None:
        """Of columns that are not divided by them."""
        return self.y.norms if self.y.raw else None

    @functools.cached_property
    def plan(self) -> str:
        """By the width; but weights of float16 without a bound stay in the registers of fused kernels, unless
        thresholds choose their pairs: other tiles would choose others."""
        swept = "lse two" if len(self.heads) > 1 else "lse gradient"
        plan = plan_for(self.x.rows, "lse heavy") if self.heavy else plan_for(self.x.rows, "lse gradient", swept)
        held = self.x.rows.dtype == torch.float16 and not self.bounded and not any(map(by_threshold, self.heads))
        return "fused" if plan == "weights" and held else plan

    @property
    def bounded(self) -> bool:
        """Whether the weights are."""
        return all(head.reduce in masked_lse_blocks.STEEPEST for head in self.heads)

    @property
    def blocks(self) -> Strips:
        """Those to go through where the plan is not fused."""
        return Strips(self.x.rows, self.y.rows, stored=self.plan == "strip", bounded=self.bounded, norms=self.norms)

    @property
    def listed(self) -> bool:
        """Whether entries of targets are gone through for every tile, which holds most of all."""
        return any(isinstance(head.target, Listed) for head in self.heads)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """lse, or the sum of a phi, and t of each head: of two by one product, unless they hold too much."""
        if self.heavy:
            kind = "lse weights heavy" if self.plan == "weights" else "lse heavy"
        else:
            kind = "lse listed" if self.listed else "lse"
        if len(self.heads) == 1 or self.heavy or self.listed:
            return [self._launch(kind, (k,))[0] for k in range(len(self.heads))]
        first, second = self.heads
        if first.axis == second.axis:
            return self._launch("lse two", (0, 1))
        return self._crosswise(first, second)

    def _crosswise(self, first: Head, second: Head) -> list[tuple[Tensor, Tensor]]:
        """Of heads over either side: programs own lines of the first one's, and leave a sum of the second's for every
        block of lines; of as many lines at a time as there is room for."""
        n, m = (len(side) for side in self.sides(first.axis))
        dtype = self.arguments[0].scale.dtype
        step = config.lookup("lse two", self.x.rows.device, self.x.rows.dtype)["BLOCK_M"]
        room = max(1, workspace() // (TABLES * dtype.itemsize * m)) * step
        own: list[tuple[Tensor, Tensor]] = []
        lse = t = None
        for begin in range(0, n, room):
            one, (parts, scores) = self._launch("lse two", (0, 1), begin, min(room, n - begin))
            own.append(one)
            merged = _merged(second, parts)
            if lse is None:
                lse = merged
            elif second.reduce == "lse":  # in float64: the rounding of a partial lse would come once a launch
                lse = torch.logaddexp(lse.to(torch.float64), merged.to(torch.float64))
            else:
                lse = lse.to(torch.float64) + merged
            if scores is not None:
                t = scores.sum(0) if t is None else t.to(torch.float64) + scores.sum(0)
        assert lse is not None
        across = lse.to(dtype), torch.zeros(m, dtype=dtype, device=lse.device) if t is None else t.to(dtype)
        along = own[0] if len(own) == 1 else (torch.cat([lse for lse, _ in own]), torch.cat([t for _, t in own]))
        return [along, across]

    def _launch(
        self, kind: str, which: tuple[int, ...], begin: int = 0, n: int | None = None
    ) -> list[tuple[Tensor, Any]]:
        """lse and t of one head or two, for n lines, or all, of the side of the first from ``begin`` on; of a second
        head over the other side (blocks of lines, m) parts of them, and None where it has no target."""
        heads, given = [self.heads[k] for k in which], [self.arguments[k] for k in which]
        axis, first_column = heads[0].axis, self.first_column
        u, v = self.sides(axis)
        if n is not None and n < len(u):
            u, m = u[begin : begin + n], len(v)
            cut = Block(begin, n, 0, m) if axis == "row" else Block(0, m, begin, n)
            norms = self.blocks.norms_of(cut)
            given = [arguments(part(head, cut), given[0].scale, self.columns, norms=norms) for head in heads]
            first_column += cut.first_column
        n, m = len(u), len(v)
        transposed = self.heavy and axis == "column"
        options = oriented(config.lookup(kind, u.device, u.dtype, self.width), transposed)
        blocks = triton.cdiv(n, options["BLOCK_M"])
        parts = config.parts(u.device, blocks, triton.cdiv(m, options["BLOCK_N"]))
        second = "" if len(heads) == 1 else "along" if heads[1].axis == axis else "across"
        along = 2 if second == "along" else 1
        new = functools.partial(torch.empty, dtype=given[0].scale.dtype, device=u.device)
        found: list[tuple[Tensor, Any]] = [(new(n), new(n)) for _ in range(along)]  # results may not share memory
        if second == "across":
            found.append((new(blocks, m), new(blocks, m) if given[1].scored else None))
        kernels.masked_lse_kernel[blocks, parts](
            *(u, v, given[0], *found[0], given[-1], *(found[1] if second else (None, None))),
            *merging(found[0][0], parts, blocks, along),
            *(n, m, self.width, first_column),
            SECOND=second,
            TRANSPOSED=transposed,
            PRECISION=config.precision(u.dtype),
            **options,
        )
        return found

    def gradient(self, upstream: Sequence[Upstream], *, rows: bool, columns: bool, wanted: Sequence[bool]) -> _Sums:
        """Of the rows, of the columns, or of both where they are the same; ``wanted``: which fields of the sums."""
        u, v = self.sides("row" if rows else "column")
        n, m, heads = len(u), len(v), len(self.heads)
        options = config.lookup("lse heavy" if self.heavy else "lse gradient", u.device, u.dtype, self.width)
        slices = triton.cdiv(self.width, options["SLICE"]) if wanted[0] else 1
        blocks = triton.cdiv(n, options["BLOCK_M"])
        parts = config.parts(u.device, blocks * slices, triton.cdiv(m, options["BLOCK_N"]))
        shapes = ((parts, n, self.width), *[(parts, heads, n)] * 3)
        tables = [
            torch.empty(shape, dtype=accumulation_dtype(u.dtype), device=u.device) if w else None
            for shape, w in zip(shapes, wanted, strict=True)
        ]
        given = tuple(
            head._replace(lse=lse, grad_lse=g, grad_target=h)
            for head, (lse, g, h) in zip(self.arguments, upstream, strict=True)
        )
        kernels.masked_lse_gradient_kernel[blocks, slices, parts](
            *(u, v, given, *tables, n, m, self.width, self.first_column),
            ROWS=rows,
            COLUMNS=columns,
            TRANSPOSED=not rows,
            PRECISION=config.precision(u.dtype),
            HEADS=heads,
            SLOTS=triton.next_power_of_2(heads),
            **options,
        )
        du, *sums = tables
        of_rows, of_columns, of_scores = (None if t is None else total(t) for t in sums)
        return _Sums(None if du is None else du[..., : u.shape[1]], of_rows, of_columns, of_scores)


def _looked_for(x: Tensor, y: Tensor | None, heads: Sequence[Head]) -> Tensor:
    """``nothing_yet``: where not all is packed before the first launch, NaN already if it is in the rows."""
    nothing = nothing_yet(x)
    gallery = x if y is None else y
    if not len(x) or not len(gallery) or any(head.width is not None for head in heads):
        look(x, nothing)
        look(gallery, nothing)
    return nothing


def oriented(options: config.Options, transposed: bool) -> config.Options:
    """Tiles for programs that own rows, or columns, the same of the pair matrix; threads hold pieces of its columns."""
    tile = {"PIECES": 1, **options}
    tile.pop("SLICE", None)
    if transposed:
        tile |= {"BLOCK_M": options["BLOCK_N"], "BLOCK_N": options["BLOCK_M"], "PIECES": 1}
    return tile


def _merged(head: Head, parts: Tensor) -> Tensor:
    """lse, or the sum of a phi, from those of parts along the first axis."""
    merged: Tensor = parts.logsumexp(0) if head.reduce == "lse" else parts.sum(0)
    return merged


def _problems(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    normalize: bool,
    first_column: int,
    columns: int,
    nothing: Tensor | None = None,
) -> Iterator[_Problem]:
    """One for every few heads of a feature width; ``nothing`` becomes NaN where the rows hold any."""

    def pack(rows: Tensor, width: int | None) -> PackedRows:
        return pack_padded(rows[:, :width], None, normalize, nothing)

    for width in dict.fromkeys(head.width for head in heads):
        u = pack(x, width)
        stays = y is not None and _stays(x, y, heads, normalize)
        v = u if y is None else in_place(y, normalize, nothing) if stays else pack(y, width)
        places = [k for k, head in enumerate(heads) if head.width == width]
        for first in range(0, len(places), HEADS):
            these = places[first : first + HEADS]
            chosen = [heads[k] for k in these]
            heavy = any(map(by_threshold, chosen)) or sum(map(conditions, chosen)) > CONDITIONS
            yield _Problem(u, v, chosen, these, heavy, first_column, columns)


def _stays(x: Tensor, y: Tensor, heads: Sequence[Head], normalize: bool) -> bool:
    """Whether columns are read where they lie: a parameter, not a batch. Thresholds compare scores that other ops find
    too, of copies; and weights over norms leave the range of float16."""
    whole = all(head.width is None and not by_threshold(head) for head in heads)
    exact = not (normalize and y.dtype == torch.float16)
    return len(y) > FEW * len(x) and whole and exact and lies_packed(y)


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    return "the Triton kernels reduce no sub-centres; impl='tiled' does" if "centers" in call.options else None


def forward(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], *, normalize: bool, first_column: int, columns: int
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head, as backends/reference defines them."""
    with torch.cuda.device_of(x):
        nothing = _looked_for(x, y, heads)
        problems = _problems(x, y, heads, normalize, first_column, columns, nothing)
        return _results(x, y, heads, problems, nothing)


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
) -> Gradients:
    """Gradients from those of each head's lse and t."""
    with torch.cuda.device_of(x):
        nothing = _looked_for(x, y, heads)
        problems = _problems(x, y, heads, normalize, first_column, columns, nothing)
        upstream = [(lse.contiguous(), g.contiguous(), h.contiguous()) for lse, (g, h) in zip(lses, grads, strict=True)]
        return _gradients(x, y, heads, problems, upstream, nothing, need, x.dtype)


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
) -> tuple[Tensor, Gradients]:
    """Sum of row_weight_i (lse_i - t_i) and its gradients, in the accumulation dtype.

    The scores are multiplied as often as by ``forward`` and ``backward``; rows are normalised and looked through once.
    """
    with torch.cuda.device_of(x):
        nothing = _looked_for(x, y, [head])
        problems = list(_problems(x, y, [head], normalize, first_column, columns, nothing))
        ((lse, t),) = _results(x, y, [head], problems, nothing)
        weight = row_weight.contiguous()
        empty = (weight == 0) & (lse == -torch.inf)
        value = (weight * torch.where(empty, t, lse - t)).sum()
        upstream = [(lse, weight, -weight)] if any(need) else []
        problems = problems if any(need) else []
        return value, _gradients(x, y, [head], problems, upstream, nothing, need, nothing.dtype)


def _results(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], problems: Iterable[_Problem], nothing: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head; ``nothing``: 0, or NaN where there is any in the rows."""
    gallery = x if y is None else y
    if not len(x) or not len(gallery):
        sizes = {"row": len(x), "column": len(gallery)}
        empty = [torch.zeros(sizes[head.axis], dtype=nothing.dtype, device=x.device) + nothing for head in heads]
        return [(t - torch.inf if h.reduce == "lse" else t.clone(), t) for h, t in zip(heads, empty, strict=True)]
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for problem in problems:
        found = (
            masked_lse_blocks.sums(problem.blocks, problem.heads, problem.first_column, problem.columns)
            if problem.plan == "strip"
            else problem.sums()
        )
        for place, (lse, t) in zip(problem.places, found, strict=True):
            results[place] = lse.add_(nothing), t.add_(nothing)
    return [results[place] for place in range(len(heads))]


def _gradients(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    problems: Iterable[_Problem],
    upstream: Sequence[Upstream],
    nothing: Tensor,
    need: Need,
    dtype: torch.dtype,
) -> Gradients:
    """Those that are wanted, in the accumulation dtype; of rows in ``dtype``."""

    def blank(wanted: bool, values: list[float | Tensor | None]) -> list[Tensor | None]:
        return [torch.zeros_like(v) if isinstance(v, Tensor) and wanted else None for v in values]

    scale = blank(need.scale, [h.scale for h in heads])
    row_bias = blank(need.row_bias, [h.row_bias for h in heads])
    column_bias = blank(need.column_bias, [h.column_bias for h in heads])
    of_x, of_y = _Side(x.shape, need.x), _Side(x.shape if y is None else y.shape, need.y and y is not None)
    parameters = Gradients(None, None, scale, row_bias, column_bias)
    if len(x) and of_y.shape[0]:
        for problem in problems:
            _add_gradients((of_x, of_y), parameters, problem, [upstream[k] for k in problem.places])
    for gradient in (*scale, *row_bias, *column_bias):  # now that all rows have been looked through
        if gradient is not None:
            gradient += nothing
    return parameters._replace(x=of_x.result(nothing, dtype), y=of_y.result(nothing, dtype))


@dataclass
class _Side:
    """The gradient of the rows of one side, as problems add to it."""

    shape: torch.Size
    wanted: bool
    last: tuple[PackedRows, Tensor] | None = None  # what was added last: of packed rows still
    total: Tensor | None = None  # of all before

    def add(self, side: PackedRows, du: Tensor | None) -> None:
        """The gradient of packed rows, or of prefixes of rows."""
        if self.wanted and du is not None:
            self._unpack()
            self.last = side, du

    def _unpack(self) -> None:
        """``last`` onto the total."""
        if self.last is not None:
            side, du = self.last
            if self.total is None:
                self.total = torch.zeros(self.shape, dtype=du.dtype, device=du.device)
            side.gradient(du, du.dtype, onto=self.total)
            self.last = None

    def result(self, nothing: Tensor, dtype: torch.dtype) -> Tensor | None:
        """With ``nothing`` added to it."""
        if not self.wanted:
            return None
        if self.total is None and self.last is not None and self.last[1].shape[-1] == self.shape[1]:
            side, du = self.last
            return side.gradient(du, dtype, nothing=nothing)
        self._unpack()
        if self.total is None:
            self.total = torch.zeros(self.shape, dtype=nothing.dtype, device=nothing.device)
        return self.total.add_(nothing).to(dtype)


def _add_gradients(
    sides: tuple[_Side, _Side], result: Gradients, problem: _Problem, upstream: Sequence[Upstream]
) -> None:
    """Those of the heads of one problem: by blocks, or in at most two launches, programs that own rows, and columns."""
    of_x, of_y = sides
    row_bias, column_bias, scale = (
        any(gradients[k] is not None for k in problem.places)
        for gradients in (result.row_bias, result.column_bias, result.scale)
    )
    symmetric = problem.x is problem.y
    if problem.plan != "fused":
        those = masked_lse_blocks.Wanted(of_x.wanted, of_y.wanted, row_bias, column_bias, scale)
        light = "lse weights sums" if row_bias or column_bias or scale else "lse weights"
        kind = "lse weights heavy" if problem.heavy or problem.listed else light
        found = masked_lse_blocks.gradients(
            problem.blocks, problem.heads, upstream, problem.first_column, problem.columns, those, kind
        )
        of_x.add(problem.x, found.du)
        of_y.add(problem.y, found.dv)
        _add_sums(result, problem, found.of_rows, found.of_columns, found.of_scores)
        return
    of_columns = of_y.wanted or (symmetric and of_x.wanted) or column_bias
    of_rows = of_x.wanted or row_bias or (scale and not of_columns)
    launches = [(True, False)] * of_rows + [(False, True)] * of_columns
    if len(launches) == 2 and symmetric and not problem.heavy:
        launches = [(True, True)]
    for rows, columns in launches:
        side, into = (problem.x, of_x) if rows or symmetric else (problem.y, of_y)
        wanted = (into.wanted, rows and row_bias, columns and column_bias, scale and (rows or not of_rows))
        sums = problem.gradient(upstream, rows=rows, columns=columns, wanted=wanted)
        into.add(side, sums.rows)
        of_scores = None if sums.of_scores is None else sums.of_scores.sum(1)
        _add_sums(result, problem, sums.of_rows, sums.of_columns, of_scores)


def _add_sums(
    result: Gradients,
    problem: _Problem,
    of_rows: Tensor | None,
    of_columns: Tensor | None,
    of_scores: Tensor | None,
) -> None:
    """Sums of W along rows and columns (heads, n), and of W s (heads,), to the heads that want them."""
    for slot, k in enumerate(problem.places):
        places = result.row_bias[k], result.column_bias[k], result.scale[k]
        for gradient, table in zip(places, (of_rows, of_columns, of_scores), strict=True):
            if gradient is not None and table is not None:
                gradient += table[slot]
