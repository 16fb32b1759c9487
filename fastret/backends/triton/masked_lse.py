"""masked_lse by the kernels of kernels/triton/masked_lse.py: normalises and lays out the rows, launches, adds parts.

Forward multiplies the rows once for each head; backward once for two heads of a feature width, and once more for the
columns of a gallery. Nothing here waits for the device: launch grids follow from shapes alone, and CUDA graphs can
capture every call. Memory beyond inputs and outputs: rows in their own dtype, their gradients in the dtype of
accumulation, O(N + M) for each head; where sums are divided into parts, a copy of them for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import Gradients, Head, Need
from fastret.backends.registry import Call
from fastret.backends.rows import PackedRows, accumulation_dtype, poison
from fastret.backends.triton import masked_lse_strips
from fastret.backends.triton.heads import Upstream, arguments, by_threshold, conditions
from fastret.backends.triton.plans import Strips, plan_for
from fastret.backends.triton.rows import pack_padded, padded, total
from fastret.kernels.triton import config, pairs
from fastret.kernels.triton import masked_lse as kernels

HEADS = 2  # that share a product of rows in backward: what registers hold, with all their conditions
CONDITIONS = 6  # that two heads may have for the larger tiles


@dataclass(frozen=True)
class _Sums:
    """What one launch of the gradient kernel returns: of the rows it owns, where wanted; sums (heads, n)."""

    rows: Tensor | None
    of_rows: Tensor | None
    of_columns: Tensor | None
    of_scores: Tensor | None


@dataclass(frozen=True)
class _Problem:
    """The rows of one feature width and one or two heads that have it.

    Attributes:
        x, y: packed rows (N, width) and columns (M, width); the same object where y is None.
        heads: those of this width.
        places: where they stand among all.
        heavy: they take small square tiles: their conditions are many, or compare scores with thresholds. Scores are
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

    def arguments(self, head: Head, upstream: Upstream | None = None) -> pairs.Head:
        """A head as the kernels take it."""
        like = torch.empty((), dtype=accumulation_dtype(self.x.rows.dtype), device=self.x.rows.device)
        return arguments(head, like, self.columns, upstream)

    def strips(self) -> Strips | None:
        """The blocks to go through; None where the fused kernels do better."""
        kind = "lse heavy" if self.heavy else "lse gradient"
        return Strips(self.x.rows, self.y.rows) if plan_for(self.x.rows, kind) == "strip" else None

    def sums(self, head: Head) -> tuple[Tensor, Tensor]:
        """lse, or the sum of a phi, and t of one head."""
        u, v = self.sides(head.axis)
        n, m = len(u), len(v)
        options = config.lookup("lse heavy" if self.heavy else "lse", u.device, u.dtype, self.width)
        blocks = triton.cdiv(n, options["BLOCK_M"])
        parts = config.parts(u.device, blocks, triton.cdiv(m, options["BLOCK_N"]))
        lse = torch.empty(parts, n, dtype=accumulation_dtype(u.dtype), device=u.device)
        t = torch.empty_like(lse)
        kernels.masked_lse_kernel[blocks, parts](
            *(u, v, self.arguments(head), lse, t, n, m, self.width, self.first_column),
            TRANSPOSED=head.axis == "column",
            PRECISION=config.precision(u.dtype),
            **{name: value for name, value in options.items() if name != "SLICE"},
        )
        return (lse.logsumexp(0) if head.reduce == "lse" and parts > 1 else total(lse)), total(t)

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
        arguments = tuple(self.arguments(h, given) for h, given in zip(self.heads, upstream, strict=True))
        kernels.masked_lse_gradient_kernel[blocks, slices, parts](
            *(u, v, arguments, *tables, n, m, self.width, self.first_column),
            ROWS=rows,
            COLUMNS=columns,
            TRANSPOSED=not rows,
            PRECISION=config.precision(u.dtype),
            HEADS=heads,
            SLOTS=triton.next_power_of_2(heads),
            **options,
        )
        du, *sums = (None if t is None else total(t) for t in tables)
        return _Sums(None if du is None else du[:, : u.shape[1]], *sums)


def _problems(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], *, normalize: bool, first_column: int, columns: int
) -> Iterator[_Problem]:
    """One for every few heads of a feature width."""

    def pack(rows: Tensor, width: int | None) -> PackedRows:
        return pack_padded(rows[:, :width], torch.arange(len(rows), device=rows.device), normalize)

    for width in dict.fromkeys(head.width for head in heads):
        u = pack(x, width)
        v = u if y is None else pack(y, width)
        places = [k for k, head in enumerate(heads) if head.width == width]
        for first in range(0, len(places), HEADS):
            these = places[first : first + HEADS]
            chosen = [heads[k] for k in these]
            heavy = any(map(by_threshold, chosen)) or sum(map(conditions, chosen)) > CONDITIONS
            yield _Problem(u, v, chosen, these, heavy, first_column, columns)


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    return "the Triton kernels reduce no sub-centres; impl='tiled' does" if "centers" in call.options else None


def forward(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], *, normalize: bool, first_column: int, columns: int
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head, as backends/reference defines them."""
    gallery = x if y is None else y
    wide = accumulation_dtype(x.dtype)
    sizes = {"row": len(x), "column": len(gallery)}
    with torch.cuda.device_of(x):
        nothing = poison(x, gallery)
        if not len(x) or not len(gallery):
            empty = [torch.zeros(sizes[head.axis], dtype=wide, device=x.device) + nothing for head in heads]
            return [(t - torch.inf if h.reduce == "lse" else t.clone(), t) for h, t in zip(heads, empty, strict=True)]
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for problem in _problems(x, y, heads, normalize=normalize, first_column=first_column, columns=columns):
            strips = problem.strips()
            found = (
                map(problem.sums, problem.heads)
                if strips is None
                else masked_lse_strips.sums(strips, problem.heads, first_column, columns)
            )
            for place, (lse, t) in zip(problem.places, found, strict=True):
                results[place] = lse.add_(nothing), t.add_(nothing)
        return [results[place] for place in range(len(heads))]


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
    gallery = x if y is None else y
    wide = accumulation_dtype(x.dtype)
    with torch.cuda.device_of(x):
        nothing = poison(x, gallery)

        def zeros(rows: Tensor | None, wanted: bool) -> Tensor | None:
            return (
                torch.zeros(rows.shape, dtype=wide, device=x.device) + nothing if rows is not None and wanted else None
            )

        def blank(wanted: bool, values: list[float | Tensor | None]) -> list[Tensor | None]:
            return [zeros(v if isinstance(v, Tensor) else None, wanted) for v in values]

        dx, dy = zeros(x, need.x), zeros(y, need.y)
        scale = blank(need.scale, [h.scale for h in heads])
        row_bias = blank(need.row_bias, [h.row_bias for h in heads])
        column_bias = blank(need.column_bias, [h.column_bias for h in heads])
        result = Gradients(dx, dy, scale, row_bias, column_bias)
        if len(x) and len(gallery):
            upstream = [
                (lse.contiguous(), g.contiguous(), h.contiguous()) for lse, (g, h) in zip(lses, grads, strict=True)
            ]
            for problem in _problems(x, y, heads, normalize=normalize, first_column=first_column, columns=columns):
                _add_gradients(result, problem, [upstream[k] for k in problem.places], need)
        return result._replace(
            x=None if dx is None else dx.to(x.dtype), y=None if dy is None or y is None else dy.to(y.dtype)
        )


def _add_gradients(result: Gradients, problem: _Problem, upstream: Sequence[Upstream], need: Need) -> None:
    """Those of the heads of one problem: by strips, or in at most two launches, programs that own rows, and columns."""
    row_bias, column_bias, scale = (
        any(gradients[k] is not None for k in problem.places)
        for gradients in (result.row_bias, result.column_bias, result.scale)
    )
    symmetric = problem.x is problem.y
    if (strips := problem.strips()) is not None:
        those = masked_lse_strips.Wanted(need.x, need.y, row_bias, column_bias, scale)
        found = masked_lse_strips.gradients(
            strips, problem.heads, upstream, problem.first_column, problem.columns, those
        )
        _add_rows(result.x, problem.x, found.du)
        _add_rows(result.y, problem.y, found.dv)
        _add_sums(result, problem, found.of_rows, found.of_columns, found.of_scores)
        return
    of_columns = need.y or (symmetric and need.x) or column_bias
    of_rows = need.x or row_bias or (scale and not of_columns)
    launches = [(True, False)] * of_rows + [(False, True)] * of_columns
    if len(launches) == 2 and symmetric and not problem.heavy:
        launches = [(True, True)]
    for rows, columns in launches:
        side, into = (problem.x, result.x) if rows or symmetric else (problem.y, result.y)
        wanted = (into is not None, rows and row_bias, columns and column_bias, scale and (rows or not of_rows))
        sums = problem.gradient(upstream, rows=rows, columns=columns, wanted=wanted)
        _add_rows(into, side, sums.rows)
        of_scores = None if sums.of_scores is None else sums.of_scores.sum(1)
        _add_sums(result, problem, sums.of_rows, sums.of_columns, of_scores)


def _add_rows(into: Tensor | None, side: PackedRows, du: Tensor | None) -> None:
    """The gradient of packed rows, or prefixes of rows, to that of the caller's."""
    if into is not None and du is not None:
        into[:, : side.rows.shape[1]] += side.gradient(du, into.dtype)


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
