"""masked_lse by strips (``plans``): stored blocks of scores, and what the kernels of kernels/triton/masked_lse.py
make of them. Heads are those of one feature width and of one launch; blocks are added up in their order.

Forward is one matmul; backward multiplies the scores again, and the pair weights once for each side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import Block, Head
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import products
from fastret.backends.triton.heads import Upstream, arguments, part, side
from fastret.backends.triton.plans import RESIDENT, Strips
from fastret.backends.triton.rows import merging, padded
from fastret.kernels.triton import config
from fastret.kernels.triton import masked_lse as kernels


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


def _options(strips: Strips, n: int, m: int) -> tuple[config.Options, int, int]:
    """Tiles, and the numbers of blocks of n rows and of parts of m columns."""
    options = config.lookup("strip", strips.u.device, strips.u.dtype)
    blocks = triton.cdiv(n, options["BLOCK_M"])
    return options, blocks, config.parts(strips.u.device, blocks, triton.cdiv(m, options["BLOCK_N"]), RESIDENT)


def sums(strips: Strips, heads: Sequence[Head], first_column: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """lse, or the sum of a phi, and t of each head.

    They are added up in float64: the rounding of a partial lse would come once a block.
    """
    wide = accumulation_dtype(strips.u.dtype)
    sizes = {"row": len(strips.u), "column": len(strips.v)}
    zeros = [torch.zeros(2, sizes[h.axis], dtype=torch.float64, device=strips.u.device) for h in heads]
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
    options, blocks, parts = _options(strips, n, m)
    lse, t = torch.empty(2, n, dtype=scores.dtype, device=scores.device)
    kernels.masked_lse_kernel[blocks, parts](
        *(scores, None, arguments(head, scores.new_empty(()), columns), lse, t, *merging(lse, parts, blocks)),
        *(n, m, scores.stride(0), first_column + b.first_column),
        TRANSPOSED=head.axis == "column",
        PRECISION="ieee",  # nothing is multiplied
        BLOCK_K=0,
        **options,
    )
    return lse, t


def gradients(
    strips: Strips,
    heads: Sequence[Head],
    upstream: Sequence[Upstream],
    first_column: int,
    columns: int,
    wanted: Wanted,
) -> Found:
    """From those of each head's lse and t."""
    u, v = strips.u, strips.v
    symmetric = u is v
    wide = accumulation_dtype(u.dtype)

    def zeros(*shape: int, of: bool) -> Tensor | None:
        return torch.zeros(*shape, dtype=wide, device=u.device) if of else None

    def like(rows: Tensor, of: bool) -> Tensor | None:
        table = zeros(len(rows), padded(rows.shape[1]), of=of)
        return None if table is None else table[:, : rows.shape[1]]

    du, dv = like(u, wanted.u), like(v, wanted.v and not symmetric)
    of_rows = zeros(len(heads), len(u), of=wanted.row_bias)
    of_columns = zeros(len(heads), len(v), of=wanted.column_bias)
    of_scores = zeros(len(heads), of=wanted.scale)
    space = strips.space_of_weights()
    for b, scores in strips.blocks():
        weights = scores if space is None else space[: b.rows, : b.columns]
        tables = _block_weights(strips, heads, upstream, b, scores, weights, first_column, columns, wanted)
        rows, others = side("row", b), side("column", b)
        if du is not None:
            products.add_product(du[rows], weights, v[others])
        if (into := du if symmetric else dv) is not None:
            products.add_product(into[others], weights.T, u[rows])
        if of_rows is not None:
            of_rows[:, rows] += tables[0].sum(0)
        if of_columns is not None:
            of_columns[:, others] += tables[1].sum(0)
        if of_scores is not None:
            of_scores += tables[2].sum((0, 2))
    return Found(du, dv, of_rows, of_columns, of_scores)


def _block_weights(
    strips: Strips,
    heads: Sequence[Head],
    upstream: Sequence[Upstream],
    b: Block,
    scores: Tensor,
    weights: Tensor,
    first_column: int,
    columns: int,
    wanted: Wanted,
) -> list[Tensor]:
    """Fills the weights; tables of sums of W along rows and columns, and of W s, to be summed over the first axis,
    and empty where they are not wanted."""
    options, blocks, parts = _options(strips, b.rows, b.columns)
    count = len(heads)
    shapes = ((parts, count, b.rows), (blocks, count, b.columns), (parts, count, b.rows))
    tables = [
        torch.empty(shape if of else 0, dtype=scores.dtype, device=scores.device)
        for shape, of in zip(shapes, wanted[2:], strict=True)
    ]
    like = scores.new_empty(())
    given = tuple(
        arguments(part(head, b), like, columns, (lse[side(head.axis, b)], g[side(head.axis, b)], h[side(head.axis, b)]))
        for head, (lse, g, h) in zip(heads, upstream, strict=True)
    )
    kernels.masked_lse_weights_kernel[blocks, 1, parts](
        *(scores, weights, given),
        *(table if of else None for table, of in zip(tables, wanted[2:], strict=True)),
        *(b.rows, b.columns, scores.stride(0), first_column + b.first_column),
        HEADS=count,
        SLOTS=triton.next_power_of_2(count),
        **options,
    )
    return tables
