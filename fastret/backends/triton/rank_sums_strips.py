"""rank_sums by blocks of its pair matrix that are stored (``plans``): "strip", scores of strips of queries with the
whole gallery, which kernels/triton/rank_sums.py reads and turns into their gradient; "weights", that gradient alone.

Forward by strips is one matmul; backward multiplies the scores again, and their slopes once for each side. Positives
are scored from the strip too: they compare with the same product of rows as everything else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import Block
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import products
from fastret.backends.triton.plans import RESIDENT, Strips
from fastret.backends.triton.rows import padded, total
from fastret.kernels.triton import config
from fastret.kernels.triton import rank_sums as kernels
from fastret.kernels.triton.pairwise import LN2

SHARING = 2  # programs with tiles of S that a multiprocessor has room for: one multiplies while the other does not

_Segments = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Upstream(NamedTuple):
    """Gradients of rank_all and rank_pos, and the sums of slopes over negatives that forward left; (P,) each."""

    grad_all: Tensor
    grad_pos: Tensor
    slopes: Tensor


class Pairs(NamedTuple):
    """The positive pairs of sorted queries: ``segments`` are start, size, first pair and, where the query itself is
    excluded, its slot, (N,) each; ``scores`` (P,), and their roots where sigmoids are factored; by strips they are
    filled strip by strip."""

    segments: _Segments
    scale: Tensor
    scores: Tensor
    roots: Tensor | None
    factored: int

    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.scale, self.scores, self.roots

    def of(self, rows: slice) -> "Pairs":
        """Those of some rows, in the same tables."""
        start, size, first, slot = self.segments
        return self._replace(segments=(start[rows], size[rows], first[rows], None if slot is None else slot[rows]))

    def add_positives(self, u: Upstream, grad_scores: Tensor, dtype: torch.dtype) -> None:
        """Fills these rows' pairs of grad_scores (P,): tau dS. dtype: of the rows."""
        start = self.segments[0]
        tile = config.lookup("sums", start.device, dtype)
        options = {name: value for name, value in tile.items() if name not in ("BLOCK_N", "BLOCK_K")}
        blocks = triton.cdiv(len(start), tile["BLOCK_M"])
        chunks = triton.cdiv(triton.cdiv(len(self.scores), len(start)), tile["CHUNK"])
        kernels.positive_gradient_kernel[blocks, config.parts(start.device, blocks, chunks, RESIDENT)](
            *(*self.segments, self.scores, u.slopes, u.grad_all, u.grad_pos, grad_scores, len(start)), **options
        )

    def weigh(
        self,
        x: Tensor,
        y: Tensor | None,
        weights: Tensor,
        first_column: int,
        unit: Tensor,
        u: Upstream,
        grad_scores: Tensor,
        parts: int,
        options: config.Options,
    ) -> None:
        """Fills weights with the gradient of the scores of these rows x with some of the gallery's, y; or of the stored
        scores x, whose place the weights may take."""
        width = x.stride(0)
        kernels.rank_weights_kernel[triton.cdiv(len(weights), options["BLOCK_M"]), parts](
            *(x, y, weights, *self.segments, self.scale, unit, *self.tables()[1:], u.grad_all, grad_scores),
            *(first_column, *weights.shape, width, weights.stride(0)),
            PRECISION="ieee" if y is None else config.precision(x.dtype),
            FACTORED=self.factored,
            **options,
        )


@dataclass(frozen=True)
class _Strip:
    """Rows [first, first + n) of S, and their pairs; ``parts`` of the gallery occupy the device."""

    first: int
    scores: Tensor
    pairs: Pairs
    parts: int
    chunk: int

    @property
    def block(self) -> Block:
        return Block(self.first, len(self.scores), 0, self.scores.shape[1])

    def options(self) -> config.Options:
        return {**config.lookup("strip", self.scores.device, self.scores.dtype), "BLOCK_K": 0}  # nothing is multiplied

    def _launch(self, kernel: Any, parts: int, arguments: tuple[Any, ...], **more: int) -> None:
        options = self.options()
        grid = triton.cdiv(len(self.scores), options["BLOCK_M"]), parts
        kernel[grid](*arguments, PRECISION="ieee", **options, **more)

    def _sizes(self) -> tuple[int, int, int]:
        return *self.scores.shape, self.scores.stride(0)

    def score_positives(self) -> None:
        """Those of these rows, to the table of all."""
        given = (self.scores, None, *self.pairs.segments[:3], *self.pairs.tables(), *self._sizes())
        self._launch(kernels.positive_scores_kernel, 1, given, FACTORED=self.pairs.factored)

    def sum(self, tables: list[Tensor | None]) -> None:
        """Fills these rows' pairs of tables (parts, P). Such short tiles mostly add across threads: factored sigmoids
        save little, and Triton 3.6 spills them."""
        given = (self.scores, None, *self.pairs.segments, *self.pairs.tables(), *tables)
        sizes = *self._sizes(), len(self.pairs.scores)
        self._launch(kernels.rank_sums_kernel, self.parts, (*given, *sizes), CHUNK=self.chunk, FACTORED=0)


def _strips(strips: Strips, pairs: Pairs) -> Iterator[_Strip]:
    """With the scores of their positives."""
    parts = _parts(strips)
    chunk = config.lookup("sums", strips.u.device, pairs.scores.dtype)["CHUNK"]
    for b, scores in strips.blocks():
        strip = _Strip(b.first_row, scores, pairs.of(slice(b.first_row, b.first_row + b.rows)), parts, chunk)
        strip.score_positives()
        yield strip


def _parts(strips: Strips) -> int:
    """The same for all strips, which share the tables of parts."""
    rows, columns = strips.shape()
    tile = config.lookup("strip", strips.u.device, strips.u.dtype)
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    return config.parts(strips.u.device, blocks, triton.cdiv(columns, tile["BLOCK_N"]), RESIDENT)


def sums(strips: Strips, pairs: Pairs, slopes: bool) -> list[Tensor]:
    """rank_all, rank_pos and, where they are wanted, slopes (P,)."""
    tables = [pairs.scores.new_empty(_parts(strips), len(pairs.scores)) for _ in range(2 + slopes)]
    for strip in _strips(strips, pairs):
        strip.sum([*tables, *[None] * (not slopes)])
    return [total(t) for t in tables]


def gradients(
    strips: Strips, pairs: Pairs, upstream: Upstream, *, of_x: bool, of_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of packed queries and gallery; where they are the same, the sum of both in the first."""
    if strips.stored:
        return _products(strips, _weights_of_scores(strips, pairs, upstream), of_x=of_x, of_y=of_y)
    grad_scores = torch.empty_like(pairs.scores)
    pairs.add_positives(upstream, grad_scores, strips.u.dtype)
    unit = pairs.scale * LN2.value
    if strips.u.dtype != torch.float16:
        return _products(strips, _weights(strips, pairs, upstream, grad_scores, unit), of_x=of_x, of_y=of_y)
    power = _power(pairs.segments[1], upstream.grad_all, grad_scores)
    found = _products(strips, _weights(strips, pairs, upstream, grad_scores, power), of_x=of_x, of_y=of_y)
    for du in found:
        if du is not None:
            du.mul_(unit / power)
    return found


def _power(size: Tensor, grad_all: Tensor, grad_scores: Tensor) -> Tensor:
    """The power of two that lifts tau dS to the top of what float16 holds, by a bound: a slope is at most 1/4. 1 where
    there is none, so that what is zero stays so; at most 2^100, times which nothing so small is infinite."""
    bound = torch.maximum(grad_all.abs().amax() * size.amax() * 0.25, grad_scores.abs().amax())
    exponent = torch.frexp(bound).exponent
    return torch.where(bound.isfinite(), torch.exp2((15 - exponent).clamp(max=100).to(bound.dtype)), 1.0)


def _weights_of_scores(strips: Strips, pairs: Pairs, upstream: Upstream) -> Iterator[tuple[Block, Tensor]]:
    grad_scores = torch.empty_like(pairs.scores)
    unit = pairs.scale * LN2.value
    space = strips.space_of_weights()
    for strip in _strips(strips, pairs):
        strip.pairs.add_positives(upstream, grad_scores, strips.u.dtype)
        weights = strip.scores if space is None else space[: len(strip.scores), : strip.scores.shape[1]]
        options = {**strip.options(), "CHUNK": strip.chunk}
        strip.pairs.weigh(strip.scores, None, weights, 0, unit, upstream, grad_scores, strip.parts, options)
        yield strip.block, weights


def _weights(
    strips: Strips, pairs: Pairs, upstream: Upstream, grad_scores: Tensor, unit: Tensor
) -> Iterator[tuple[Block, Tensor]]:
    """``unit`` times tau dS."""
    u, v, space = strips.u, strips.v, strips.space_of_weights()
    assert space is not None
    options = config.lookup("sums", u.device, u.dtype)
    for b in strips.places():
        blocks, tiles = triton.cdiv(b.rows, options["BLOCK_M"]), triton.cdiv(b.columns, options["BLOCK_N"])
        parts = config.parts(u.device, blocks, tiles, SHARING)
        rows, columns = slice(b.first_row, b.first_row + b.rows), slice(b.first_column, b.first_column + b.columns)
        weights = space[: b.rows, : b.columns]
        pairs.of(rows).weigh(u[rows], v[columns], weights, b.first_column, unit, upstream, grad_scores, parts, options)
        yield b, weights


def _products(
    strips: Strips, weights: Iterable[tuple[Block, Tensor]], *, of_x: bool, of_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the blocks of weights and the rows on either side."""
    u, v = strips.u, strips.v
    symmetric = u is v

    def zeros(rows: Tensor, of: bool) -> Tensor | None:
        wide = accumulation_dtype(rows.dtype)
        return rows.new_zeros(len(rows), padded(rows.shape[1]), dtype=wide)[:, : rows.shape[1]] if of else None

    du, dv = zeros(u, of_x), zeros(v, of_y and not symmetric)
    for b, w in weights:
        rows, columns = slice(b.first_row, b.first_row + b.rows), slice(b.first_column, b.first_column + b.columns)
        if du is not None:
            products.add_product(du[rows], w, v[columns])
        if (into := du if symmetric else dv) is not None:
            products.add_product(into[columns], w.T, u[rows])
    return du, dv
