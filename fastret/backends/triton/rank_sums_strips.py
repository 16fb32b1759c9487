"""rank_sums by strips (``plans``) of queries with the whole gallery, which kernels/triton/rank_sums.py reads.

Forward is one matmul; backward multiplies the scores again, and their slopes once for each side. Positives are scored
from the strip too: they compare with the same product of rows as everything else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from torch import Tensor

from fastret.backends.triton import products
from fastret.backends.triton.plans import RESIDENT, Strips
from fastret.backends.triton.rows import padded, total
from fastret.kernels.triton import config
from fastret.kernels.triton import rank_sums as kernels

_Segments = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Pairs(NamedTuple):
    """The positive pairs of sorted queries: ``segments`` are start, size, first pair and, where the query itself is
    excluded, its slot, (N,) each; ``scores`` (P,), and their roots where sigmoids are factored, are filled strip
    by strip."""

    segments: _Segments
    scale: Tensor
    scores: Tensor
    roots: Tensor | None
    factored: int

    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.scale, self.scores, self.roots


@dataclass(frozen=True)
class _Strip:
    """Rows [first, first + n) of S with their segments; ``parts`` of the gallery occupy the device."""

    first: int
    scores: Tensor
    segments: _Segments
    pairs: Pairs
    parts: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.scores))

    def _launch(self, kernel: Any, parts: int, arguments: tuple[Any, ...], **options: Any) -> None:
        tile = config.lookup("strip", self.scores.device, self.scores.dtype)
        grid = triton.cdiv(len(self.scores), tile["BLOCK_M"]), parts
        kernel[grid](*arguments, **tile, **options)

    def _sizes(self) -> tuple[int, int, int]:
        return *self.scores.shape, self.scores.stride(0)

    def score_positives(self) -> None:
        """Those of these rows, to the table of all."""
        given = (self.scores, None, *self.segments[:3], *self.pairs.tables(), *self._sizes())
        options = {"PRECISION": "ieee", "BLOCK_K": 0}  # nothing is multiplied
        self._launch(kernels.positive_scores_kernel, 1, given, FACTORED=self.pairs.factored, **options)

    def sum(self, kernel: Any, inputs: tuple[Tensor, ...], tables: list[Tensor]) -> None:
        """Fills these rows' pairs of tables (parts, P). Such short tiles mostly add across threads: factored sigmoids
        save little, and Triton 3.6 spills them."""
        given = (self.scores, None, *self.segments, *self.pairs.tables(), *inputs, *tables)
        chunk = config.lookup("sums", self.scores.device, self.scores.dtype)["CHUNK"]
        sizes = *self._sizes(), len(self.pairs.scores)
        self._launch(kernel, self.parts, (*given, *sizes), CHUNK=chunk, PRECISION="ieee", FACTORED=0, BLOCK_K=0)

    def weigh(self, weights: Tensor, grad_all: Tensor, grad_scores: Tensor) -> None:
        """Fills the weights, which may be the scores."""
        given = (self.scores, weights, *self.segments, *self.pairs.tables(), grad_all, grad_scores)
        self._launch(kernels.rank_weights_kernel, self.parts, (*given, *self._sizes()), FACTORED=self.pairs.factored)


def _parts(strips: Strips) -> int:
    """The same for all strips, which share the tables of parts."""
    rows, columns = strips.shape()
    tile = config.lookup("strip", strips.u.device, strips.u.dtype)
    blocks = triton.cdiv(rows, tile["BLOCK_M"])
    return config.parts(strips.u.device, blocks, triton.cdiv(columns, tile["BLOCK_N"]), RESIDENT)


def _strips(strips: Strips, pairs: Pairs) -> Iterator[_Strip]:
    """With the scores of their positives."""
    parts = _parts(strips)
    for b, scores in strips.blocks():
        rows = slice(b.first_row, b.first_row + b.rows)
        start, size, first, slot = pairs.segments
        segments = start[rows], size[rows], first[rows], None if slot is None else slot[rows]
        strip = _Strip(b.first_row, scores, segments, pairs, parts)
        strip.score_positives()
        yield strip


def sums(strips: Strips, pairs: Pairs) -> list[Tensor]:
    """rank_all, rank_pos (P,)."""
    tables = [pairs.scores.new_empty(_parts(strips), len(pairs.scores)) for _ in range(2)]
    for strip in _strips(strips, pairs):
        strip.sum(kernels.rank_sums_kernel, (), tables)
    return [total(t) for t in tables]


def gradients(
    strips: Strips, pairs: Pairs, grad_all: Tensor, grad_pos: Tensor, *, of_x: bool, of_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of packed queries and gallery; where they are the same, the sum of both in the first."""
    u, v = strips.u, strips.v
    symmetric = u is v

    def zeros(rows: Tensor, of: bool) -> Tensor | None:
        return pairs.scores.new_zeros(len(rows), padded(rows.shape[1]))[:, : rows.shape[1]] if of else None

    du, dv = zeros(u, of_x), zeros(v, of_y and not symmetric)
    table = pairs.scores.new_zeros(_parts(strips), len(pairs.scores))  # all of it is summed after every strip
    space = strips.space_of_weights()
    for strip in _strips(strips, pairs):
        strip.sum(kernels.pair_gradient_kernel, (grad_all, grad_pos), [table])
        weights = strip.scores if space is None else space[: len(strip.scores), : strip.scores.shape[1]]
        strip.weigh(weights, grad_all, total(table))
        if du is not None:
            products.add_product(du[strip.rows], weights, v)
        if (into := du if symmetric else dv) is not None:
            products.add_product(into, weights.T, u[strip.rows])
    return du, dv
