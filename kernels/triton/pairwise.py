"""Tiles of a pair matrix S = X Y^T that is never stored, and functions of its elements: shared by all kernels.

Rows are stored one after the other, (rows, width), the width padded with zeros to a multiple of 16 so that loads are
vectors. Row numbers are int32, addresses int64. Accumulation is in float32, float64 for float64 rows. bfloat16 is
widened right after a load, except for operands of tl.dot.

The strip plan has the scores of some rows multiplied elsewhere: where a function takes x and y and y is None, x holds
the scores themselves, ``width`` apart.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def owned_rows(n, BLOCK_M: tl.constexpr):
    """The rows of this program along grid axis 0, and whether they exist; those that do not repeat the last."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.minimum(row, n - 1), row < n


@triton.jit
def owned_columns(m, AXIS: tl.constexpr, BLOCK_N: tl.constexpr):
    """begin, end of this program's share of m columns, which the programs along a grid axis divide in whole tiles."""
    share = tl.cdiv(tl.cdiv(m, BLOCK_N), tl.num_programs(AXIS)) * BLOCK_N
    begin = tl.program_id(AXIS) * share
    return begin, tl.minimum(begin + share, m)


@triton.jit
def last_to_arrive(arrived, AXIS: tl.constexpr):
    """Whether this program is the last along a grid axis of those that own the same rows; it may then read what all of
    them stored before. ``arrived``: a zero for each block of rows."""
    tl.debug_barrier()  # the thread that counts releases, and acquires, for all of the program
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    return before == tl.num_programs(AXIS) - 1


@triton.jit
def stored_tile(scores, row, column, width):
    """Elements (row, column), which broadcast, of a matrix whose rows are ``width`` apart."""
    return tl.load(scores + row.to(tl.int64) * width + column)


@triton.jit
def dot_tile(x, y, row, column, width, dtype: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """(M, N) dot products <x_row, y_column> of existing rows ``row`` (M,) and ``column`` (N,).

    PRECISION is that of float32 products: IEEE unless the user said otherwise, as small temperatures multiply what TF32
    loses.
    """
    if y is None:
        return stored_tile(x, row[:, None], column[None, :], width)
    else:
        x_row = x + row.to(tl.int64)[:, None] * width
        y_row = y + column.to(tl.int64)[None, :] * width
        total = tl.zeros((row.shape[0], column.shape[0]), dtype=dtype)
        for begin in range(0, width, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x_row + k[None, :], mask=k[None, :] < width, other=0.0)
            y_tile = tl.load(y_row + k[:, None], mask=k[:, None] < width, other=0.0)
            total = tl.dot(x_tile, y_tile, total, input_precision=PRECISION, out_dtype=total.dtype)
        return total


@triton.jit
def columns_of(tile, K: tl.constexpr, PIECES: tl.constexpr):
    """The K-th of as many pieces of columns of a tile, by halves of what each thread holds already. A kernel that takes
    them by turns holds what belongs to columns for one piece only."""
    if PIECES == 1:
        return tile
    else:
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        if K < PIECES // 2:
            return columns_of(left, K, PIECES // 2)
        else:
            return columns_of(right, K - PIECES // 2, PIECES // 2)


@triton.jit
def score_tile(x, y, row, column, width, scale, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """``dot_tile`` times ``scale``, in its dtype."""
    return dot_tile(x, y, row, column, width, scale.dtype, PRECISION, BLOCK_K) * scale


@triton.jit
def add_weighted(total, weights, rows, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """total (M, F) + weights (M, N) @ rows (N, F), the weights and rows taken in the dtype that rows are stored in.

    float16 has too little range for gradients: it goes through TF32, which holds float16 rows exactly and gives the
    weights the same 10 bits.
    """
    if dtype == tl.float16:
        return tl.dot(weights, rows.to(tl.float32), total, input_precision="tf32")
    else:
        return tl.dot(weights.to(dtype), rows.to(dtype), total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def add_weighted_rows(total, weights, y, column, feature, width, PRECISION: tl.constexpr):
    """total (M, F) + weights (M, N) @ y[column, feature], features beyond the width as 0."""
    address = y + column.to(tl.int64)[:, None] * width + feature[None, :]
    rows = tl.load(address, mask=feature[None, :] < width, other=0.0)
    return add_weighted(total, weights, rows, rows.dtype, PRECISION)


@triton.jit
def exponential(z):
    """e^z. log2(e) multiplies differences of logits, not logits: their rounding would be that much larger."""
    return tl.exp2(z * LOG2E)


@triton.jit
def sigmoid2(z):
    """1 / (1 + 2^-z): the sigmoid of z ln 2; 0 and 1 at infinity."""
    return 1.0 / (1.0 + tl.exp2(-z))


@triton.jit
def sigmoid2_slope(z):
    """u (1 - u) for u = sigmoid2(z); by symmetry from 2^-|z|, which neither overflows nor cancels. 0 at infinity."""
    e = tl.exp2(-tl.abs(z))
    u = 1.0 / (1.0 + e)
    return e * u * u


@triton.jit
def reciprocal(y, FACTORED: tl.constexpr):
    """1 / y. FACTORED = 2, for float32 on NVIDIA GPUs: without the scaling that division does for y above 2^126, where
    this is 0, and below 2^-126, where this is infinite; the operation and its accuracy are those of a division."""
    if FACTORED == 2 and y.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / y


@triton.jit
def factored_sigmoid(ratio, FACTORED: tl.constexpr):
    """sigmoid2(z) for ratio = 2^(-z / 2); 0 where its square overflows, 1 where it vanishes."""
    return reciprocal(1.0 + ratio * ratio, FACTORED)


@triton.jit
def factored_slope_root(ratio, FACTORED: tl.constexpr):
    """The square root of sigmoid2_slope(z) for ratio = 2^(-z / 2), not below 2^-60: infinity times 0 is no number."""
    near = tl.minimum(ratio, 2.0**60)
    return near * factored_sigmoid(near, FACTORED)
