"""pair_dot: scores of an explicit list of pairs of rows, and their gradient.

    s_p = <x_{row_p}, y_{column_p}>,           du_i = sum over the pairs p of row i of g_p v_{partner_p}

Forward: a program scores a block of pairs. Backward: the pairs come sorted by the row that is to be summed, those of
row i are [start_i, start_{i+1}), and a program owns one row and a slice of its features. No atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("pairs",))
def pair_scores_kernel(x, y, row, column, scores, pairs, width, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """scores (P,) of the pairs (row_p, column_p), int64."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = pair < pairs
    pair = tl.minimum(pair, pairs - 1)
    x_row = x + tl.load(row + pair)[:, None] * width
    y_row = y + tl.load(column + pair)[:, None] * width
    dtype: tl.constexpr = scores.dtype.element_ty
    total = tl.zeros((BLOCK_P, BLOCK_K), dtype)
    for begin in range(0, width, BLOCK_K):
        k = (begin + tl.arange(0, BLOCK_K))[None, :]
        x_tile = tl.load(x_row + k, mask=k < width, other=0.0).to(dtype)
        y_tile = tl.load(y_row + k, mask=k < width, other=0.0).to(dtype)
        total += x_tile * y_tile
    tl.store(scores + pair, tl.sum(total, 1), mask=exists)


@triton.jit
def pair_gradient_kernel(v, start, partner, grad, du, width, SLICE: tl.constexpr, BLOCK_P: tl.constexpr):
    """du (n, width): grid axis 0 are its rows, axis 1 divides the features."""
    row = tl.program_id(0).to(tl.int64)
    feature = (tl.program_id(1) * SLICE + tl.arange(0, SLICE))[None, :]
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    total = tl.zeros((BLOCK_P, SLICE), du.dtype.element_ty)
    for low in range(begin, end, BLOCK_P):
        pair = low + tl.arange(0, BLOCK_P)
        inside = pair < end
        other = tl.load(partner + pair, mask=inside, other=0)[:, None]
        weight = tl.load(grad + pair, mask=inside, other=0.0)[:, None]
        rows = tl.load(v + other * width + feature, mask=inside[:, None] & (feature < width), other=0.0)
        total += weight * rows.to(total.dtype)
    tl.store(du + row * width + feature, tl.sum(total, 0, keep_dims=True), mask=feature < width)
