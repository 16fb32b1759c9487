"""sampled_dot: scores of rows against rows of a bank that are listed, or drawn, and the gradient of the rows.

    s_ik = <x_i, M_{c_ik}>,        dx_i = sum over k of g_ik M_{c_ik}

The columns c_i of a row are drawn anew wherever they are needed, by the generator of fastret/backends/sampling.py,
whose counters, keys and words are those of tl.philox. A program owns a row and some of its columns: forward for their
scores, backward for a part of the sum over them, to be added by the caller, and for a slice of the features. The
gradient of the bank is that of a list of pairs (pair_dot.py), sorted by the columns, which one more kernel writes.
No atomics.

These are gathers: rows of the bank are read once per score and direction, from memory where the bank is much larger
than the caches, and nothing else counts. All loads of a tile, BLOCK_S rows 16 bytes at a time, are under way together.
Predicted from that, not yet run on a GPU (H100, 3.35 TB/s; float32, half of it with a bank in half precision):

    B = 256, D = 128        bytes read     multiply-adds   words drawn     least time a direction
    K = 4,096               0.54 GB        0.13 G          1.0 M           0.16 ms
    K = 65,536              8.6 GB         2.1 G           17 M            2.6 ms

The arithmetic, about 30 G multiply-adds and 60 M words (every warp draws for its block) a millisecond, hides behind
the reads.
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairwise import owned_columns


@triton.jit
def columns_of(first, index, seed, row, block, count, size, BLOCK_S: tl.constexpr):
    """Columns (BLOCK_S,) of a row, int64; their places among all of its; and whether they exist. Those that do not are
    rows of the bank all the same.

    A row's own column stands before the ``count`` others, which begin a block of four: as they are drawn.
    """
    OWN: tl.constexpr = 0 if first is None else 1
    begin = block * BLOCK_S - 4 * OWN
    k = begin + tl.arange(0, BLOCK_S)
    exists = (k >= -OWN) & (k < count)
    if index is not None:
        column = tl.load(index + row.to(tl.int64) * count + k, mask=exists & (k >= 0), other=0)
    else:
        four = begin // 4 + tl.arange(0, BLOCK_S // 4)
        zero = four * 0
        w0, w1, w2, w3 = tl.philox(tl.load(seed), four, zero + row, zero, zero)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_S,))
        column = tl.umulhi(words, size.to(tl.uint32)).to(tl.int64)
    if first is not None:
        column = tl.where(k < 0, tl.load(first + row), column)
    return column, row.to(tl.int64) * (count + OWN) + k + OWN, exists


@triton.jit
def bank_rows(bank, column, exists, feature, dtype: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """(BLOCK_S, F) rows ``column``, int64, of the bank at ``feature`` (1, F); 0 beyond the width and of no column."""
    address = bank + column[:, None] * STRIDE + feature
    return tl.load(address, mask=exists[:, None] & (feature < WIDTH), other=0.0).to(dtype)


@triton.jit(do_not_specialize=("blocks", "count", "size"))
def sampled_scores_kernel(
    x, bank, first, index, seed, scores, blocks, count, size, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores (n, S). Rows of the bank stand STRIDE apart; grid axis 0: the ``blocks`` of every row, row by row."""
    row = tl.program_id(0) // blocks
    column, place, exists = columns_of(first, index, seed, row, tl.program_id(0) % blocks, count, size, BLOCK_S)
    dtype: tl.constexpr = scores.dtype.element_ty
    x_row = x + row.to(tl.int64) * WIDTH
    total = tl.zeros((BLOCK_S, BLOCK_D), dtype)
    for begin in range(0, WIDTH, BLOCK_D):
        feature = (begin + tl.arange(0, BLOCK_D))[None, :]
        x_tile = tl.load(x_row + feature, mask=feature < WIDTH, other=0.0).to(dtype)
        total += x_tile * bank_rows(bank, column, exists, feature, dtype, WIDTH, STRIDE)
    tl.store(scores + place, tl.sum(total, 1), mask=exists)


@triton.jit(do_not_specialize=("blocks", "count", "size"))
def sampled_row_gradient_kernel(
    bank, first, index, seed, grad, dx, blocks, count, size, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dx (parts, n, WIDTH), to be summed over the parts: grid axis 0 are the rows, axis 1 divides their features, axis
    2 their columns."""
    row = tl.program_id(0)
    feature = (tl.program_id(1) * SLICE + tl.arange(0, SLICE))[None, :]
    dtype: tl.constexpr = dx.dtype.element_ty
    total = tl.zeros((BLOCK_S, SLICE), dtype)
    low, high = owned_columns(blocks, 2, 1)
    for block in range(low, high):
        column, place, exists = columns_of(first, index, seed, row, block, count, size, BLOCK_S)
        weight = tl.load(grad + place, mask=exists, other=0.0)
        total += weight[:, None] * bank_rows(bank, column, exists, feature, dtype, WIDTH, STRIDE)
    target = dx + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + row) * WIDTH + feature
    tl.store(target, tl.sum(total, 0, keep_dims=True), mask=feature < WIDTH)


@triton.jit(do_not_specialize=("blocks", "count", "size"))
def sampled_columns_kernel(first, index, seed, columns, blocks, count, size, BLOCK_S: tl.constexpr):
    """columns (n, S); grid as for the scores."""
    row = tl.program_id(0) // blocks
    column, place, exists = columns_of(first, index, seed, row, tl.program_id(0) % blocks, count, size, BLOCK_S)
    tl.store(columns + place, column.to(columns.dtype.element_ty), mask=exists)
