"""masked_lse by blocks of pairs whose weights are stored, and in the strip plan scores (``plans``): what the kernels
of kernels/triton/masked_lse.py make of them. Heads are those of one feature width and of one launch; blocks are added
up in their order.

Backward is one kernel a block, which multiplies the scores itself or takes the stored ones, and one matmul a side. In
float16, which has too little range for gradients, weights are stored times ``power_of_two``.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import Block, Circulant, Dense, Head, Listed, Masked, Target
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import products
from fastret.backends.triton.heads import Upstream, arguments, part, side
from fastret.backends.triton.plans import RESIDENT, Strips
from fastret.backends.triton.rows import merging, padded
from fastret.kernels.triton import config
from fastret.kernels.triton import masked_lse as kernels

WAVES = 8  # programs a multiprocessor, by turns, that multiply tiles of weights: the last of them are few beside all
# What slopes of a reduction are at most: e^(l - lse), and by the resolution of fastret/backends/phi.py. Those of the
# others reach 2^23 near 0, where float16, scaled for them, would have nothing left for the rest.
STEEPEST = {"lse": 1.0, "hinge": 1.0, "distance": 256.0}
HIGHEST = 15  # exponent of a power of two: weights in float16 stay below it


class Wanted(NamedTuple):
    """Which gradients: of the rows u and v, of biases, of the scale."""

    u: bool
    v: bool
    row_bias: bool
    column_bias: bool
    scale: bool


class Found(NamedTuple):
    """Those gradients: of packed rows, where u is v the sum of both in du; sums of W along rows (heads, n) and columns
    (heads, m), and of W s (heads,)."""

    du: Tensor | None
    dv: Tensor | None
    of_rows: Tensor | None
    of_columns: Tensor | None
    of_scores: Tensor | None


def sums(strips: Strips, heads: Sequence[Head], first_column: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """lse, or the sum of a phi, and t of each head, of stored scores.

    They are added up in float64: the rounding of a partial lse would come once a block.
    """
    wide = accumulation_dtype(strips.u.dtype)
    sizes = {"row": len(strips.u), "column": len(strips.v)}
    new = functools.partial(torch.zeros, dtype=torch.float64, device=strips.u.device)
    zeros = [(new(sizes[h.axis]), new(sizes[h.axis])) for h in heads]  # results may not share memory
    for head, (lse, _) in zip(heads, zeros, strict=True):
        if head.reduce == "lse":
            lse.fill_(-torch.inf)
    for b, scores in strips.blocks():
        for head, (lse, t) in zip(heads, zeros, strict=True):
            found, score = _block_sums(strips, part(head, b), b, scores, first_column, columns)
            here = side(head.axis, b)
            if head.reduce == "lse":
                lse[here] = torch.logaddexp(lse[here], found.to(torch.float64))
            else:
                lse[here] += found
            t[here] += score
    return [(lse.to(wide), t.to(wide)) for lse, t in zeros]


def _block_sums(
    strips: Strips, head: Head, b: Block, scores: Tensor, first_column: int, columns: int
) -> tuple[Tensor, Tensor]:
    n, m = (b.rows, b.columns) if head.axis == "row" else (b.columns, b.rows)
    options = config.lookup("strip", strips.u.device, strips.u.dtype)
    blocks = triton.cdiv(n, options["BLOCK_M"])
    parts = config.parts(strips.u.device, blocks, triton.cdiv(m, options["BLOCK_N"]), RESIDENT)
    lse, t = torch.empty(2, n, dtype=scores.dtype, device=scores.device)
    given = arguments(head, scores.new_empty(()), columns, norms=strips.norms_of(b))
    kernels.masked_lse_kernel[blocks, parts](
        *(scores, None, given, lse, t, given, None, None, *merging(lse, parts, blocks)),
        *(n, m, scores.stride(0), first_column + b.first_column),
        SECOND="",
        TRANSPOSED=head.axis == "column",
        PRECISION="ieee",  # nothing is multiplied
        BLOCK_K=0,
        PIECES=1,
        **options,
    )
    return lse, t


def power_of_two(heads: Sequence[Head], upstream: Sequence[Upstream], columns: int) -> Tensor:
    """What the weights T of these heads are multiplied by so that all of them lie below 2^HIGHEST, and not far below: a
    number on the device, found there. What is not finite does not count, as it is lost on the way whatever it is
    multiplied by; the rest is not lost with it."""
    most = torch.zeros_like(upstream[0][0][:1]).sum()
    for head, (lse, g, h) in zip(heads, upstream, strict=True):
        if head.reduce == "lse":
            g = torch.where(lse == -torch.inf, 0, g)
        y = (1 - head.smoothing) * _heaviest(head.target) + head.smoothing / columns
        most = most + (head.scale * (STEEPEST[head.reduce] * _largest(g) + _largest(h) * y)).abs()
    # one more for the rounding of scores; and no power whose inverse is not a normal number
    exponent = torch.frexp(_finite(most))[1].add(1).clamp(HIGHEST - 120, HIGHEST + 120)
    return torch.ldexp(torch.ones_like(most), HIGHEST - exponent)


def _finite(t: Tensor) -> Tensor:
    return torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0)


def _largest(t: Tensor) -> Tensor:
    """Magnitude, of what is finite."""
    return _finite(t).abs().amax() if t.numel() else t.new_zeros(())


def _heaviest(target: Target | None) -> float | Tensor:
    """No pair's target weighs more."""
    match target:
        case None:
            return 0.0
        case Masked():
            return _largest(target.weight)
        case Dense():
            return _largest(target.weights)
        case Listed():
            return _largest(target.weight) * target.offsets.diff().amax()
        case Circulant():
            return math.fsum(map(abs, target.weights))
        case _:
            return 1.0


class _Gradient:
    """Of rows: a table that blocks add products to, and never read before they wrote it. Those that are added to later
    rows than all before follow these without a gap."""

    def __init__(self, rows: Tensor) -> None:
        space = torch.empty(len(rows), padded(rows.shape[1]), dtype=accumulation_dtype(rows.dtype), device=rows.device)
        self.table, self._written = space[:, : rows.shape[1]], 0

    def add(self, here: slice, a: Tensor, b: Tensor) -> None:
        """a @ b to the rows ``here``."""
        if here.start == self._written:
            products.multiply(a, b, self.table[here])
        else:
            self.table[self._written : here.stop] = 0
            products.add_product(self.table[here], a, b)
        self._written = max(self._written, here.stop)


@dataclass(frozen=True)
class _Launch:
    """What the kernel is told that is the same for every block."""

    strips: Strips
    heads: Sequence[Head]
    upstream: Sequence[Upstream]
    first_column: int
    columns: int
    wanted: Wanted
    options: config.Options
    unit: Tensor | None

    def fill(self, weights: Tensor | None, b: Block, scores: Tensor | None) -> list[Tensor]:
        """The weights, where there is a place for them; tables of sums of W along rows and columns, and of W s, to be
        summed over the first axis, and empty where they are not wanted."""
        u, v = self.strips.u[side("row", b)], self.strips.v[side("column", b)]
        blocks = triton.cdiv(b.rows, self.options["BLOCK_M"])
        resident = WAVES if scores is None else RESIDENT
        parts = config.parts(u.device, blocks, triton.cdiv(b.columns, self.options["BLOCK_N"]), resident)
        count, given = len(self.heads), self.wanted[2:]
        shapes = ((parts, count, b.rows), (blocks, count, b.columns), (parts, count, b.rows))
        like = torch.empty((), dtype=accumulation_dtype(u.dtype), device=u.device)
        tables = [like.new_empty(shape if of else 0) for shape, of in zip(shapes, given, strict=True)]
        heads = tuple(
            arguments(
                part(head, b), like, self.columns, _of_block(upstream, side(head.axis, b)), self.strips.norms_of(b)
            )
            for head, upstream in zip(self.heads, self.upstream, strict=True)
        )
        factors = (u, v) if scores is None else (scores, None)
        kernels.masked_lse_weights_kernel[blocks, 1, parts](
            *(*factors, heads, weights, self.unit),
            *(table if of else None for table, of in zip(tables, given, strict=True)),
            *(b.rows, b.columns, padded(u.shape[1]) if scores is None else scores.stride(0)),
            *(0 if weights is None else weights.stride(0), self.first_column + b.first_column),
            PRECISION=config.precision(u.dtype),
            HEADS=count,
            **self.options,
        )
        return tables


def _of_block(upstream: Upstream, here: slice) -> Upstream:
    lse, g, h = upstream
    return lse[here], g[here], h[here]


def _blocks(strips: Strips) -> Iterator[tuple[Block, Tensor | None]]:
    """With the scores, where they are stored."""
    if strips.stored:
        yield from strips.blocks()
    else:
        yield from ((b, None) for b in strips.places())


def gradients(
    strips: Strips,
    heads: Sequence[Head],
    upstream: Sequence[Upstream],
    first_column: int,
    columns: int,
    wanted: Wanted,
    kind: str,
) -> Found:
    """From those of each head's lse and t; ``kind``: of the tiles that multiply scores that are not stored."""
    u, v = strips.u, strips.v
    symmetric = u is v
    tiles = config.lookup("strip" if strips.stored else kind, u.device, u.dtype)
    options = {"PIECES": 1, "BLOCK_K": 0, **tiles}  # stored scores are not multiplied

    def zeros(*shape: int, of: bool) -> Tensor | None:
        return torch.zeros(*shape, dtype=accumulation_dtype(u.dtype), device=u.device) if of else None

    du = _Gradient(u) if wanted.u else None
    dv = du if symmetric else _Gradient(v) if wanted.v else None
    of_rows = zeros(len(heads), len(u), of=wanted.row_bias)
    of_columns = zeros(len(heads), len(v), of=wanted.column_bias)
    of_scores = zeros(len(heads), of=wanted.scale)
    multiplied = du is not None or dv is not None
    space = strips.space_of_weights() if multiplied else None
    scaled = space is not None and space.dtype == torch.float16
    unit = power_of_two(heads, upstream, columns) if scaled else None
    launch = _Launch(strips, heads, upstream, first_column, columns, wanted, options, unit)
    for b, scores in _blocks(strips):
        weights = None if not multiplied else scores if space is None else space[: b.rows, : b.columns]
        tables = launch.fill(weights, b, scores)
        rows, others = side("row", b), side("column", b)
        if du is not None and weights is not None:
            du.add(rows, weights, v[others])
        if dv is not None and weights is not None:
            dv.add(others, weights.T, u[rows])
        if of_rows is not None:
            of_rows[:, rows] += tables[0].sum(0)
        if of_columns is not None:
            of_columns[:, others] += tables[1].sum(0)
        if of_scores is not None:
            of_scores += tables[2].sum((0, 2))
    of_u, of_v = (None if gradient is None else gradient.table for gradient in (du, None if symmetric else dv))
    if unit is not None:
        for table in (of_u, of_v):
            if table is not None:
                table /= unit
    return Found(of_u, of_v, of_rows, of_columns, of_scores)
