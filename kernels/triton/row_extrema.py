"""row_extrema: the least or greatest allowed score of every row of a pair matrix, and the first column that has it.

    v_i = max over allowed j of s_ij,      a_i = the least such j;      minima are those of -s, negated

A program owns rows and sweeps the columns, upwards; where too few would run, several share a block of rows and the
caller compares their parts. Scores are the tiles that masked_lse has for masks by threshold, bit for bit; where y is
None, x holds stored ones (``pairwise``).
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairs import allowed
from fastret.kernels.triton.pairwise import dot_tile, owned_columns, owned_rows

INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=("mask", "n", "m", "first_column"))
def row_extrema_kernel(
    x, y, mask, value, index, n, m, width, first_column,
    GREATEST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """value and index (parts, n): grid axis 1 divides the columns. Without an allowed pair: infinity and -1."""
    row, exists = owned_rows(n, BLOCK_M)
    dtype: tl.constexpr = value.dtype.element_ty
    best = tl.full((BLOCK_M,), -INF, dtype)
    place = tl.full((BLOCK_M,), -1, tl.int32)
    begin, end = owned_columns(m, 1, BLOCK_N)
    for low in range(begin, end, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        valid = (column < m)[None, :]
        column = tl.minimum(column, m - 1)
        s = dot_tile(x, y, row, column, width, dtype, PRECISION, BLOCK_K)
        ok = allowed(mask, s, row[:, None], column[None, :], first_column, valid)
        s = tl.where(ok, s if GREATEST else -s, -INF)
        top = tl.max(s, 1)
        first = tl.min(tl.where(s == top[:, None], column[None, :], m), 1)
        better = top > best  # equals stay with the earlier column
        place = tl.where(better, first, place)
        best = tl.where(better, top, best)
    target = tl.program_id(1).to(tl.int64) * n + row
    tl.store(value + target, best if GREATEST else -best, mask=exists)
    tl.store(index + target, tl.where(place < 0, -1, place.to(tl.int64) + first_column), mask=exists)
