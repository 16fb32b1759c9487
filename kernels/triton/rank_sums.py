"""rank_sums: sums of sigmoids over the gallery for each query's positives, and the gradient of any function of them.

Rows come sorted by class, so the positives of query q are the gallery rows [start_q, start_q + size_q), a short stretch
of its row of S. Pair (q, i) is number first_q + i - start_q of P; i - start_q is its slot. z_qj = s_qj log2(e) / tau:

    rank_pos[q, i] = 1 + sum over positives j != i of u(z_qj - z_qi),         u(z) = 1 / (1 + 2^-z)
    rank_all[q, i] = rank_pos[q, i] + sum over negatives j of u(z_qj - z_qi)

Negatives come from tiles of S in which positives are masked out; positives from a table of the P positive scores, so
that j = i is exact. Backward, for upstream gradients a = d/d rank_all, b = d/d rank_pos and w = a + b, u' = u (1 - u):

    tau dS_qi = sum over positives j of (w_qj - w_qi) u'(z_qj - z_qi) - a_qi sum over negatives j of u'(z_qj - z_qi)
    tau dS_qj = sum over positives i of a_qi u'(z_qj - z_qi)                                           for negatives j

The first line is again a table of P numbers, and its sum over negatives, which knows nothing of the gradients, is taken
by forward with the sums of u: ``slopes`` (P,). The second is recomputed tile by tile and multiplied by the rows at once
(fused), or stored for the caller to multiply: dX = dS Y, dY = dS^T X; gallery = batch: dX = (dS + dS^T) X. A program
writes rows that it alone owns; where too few would run, several share a block of rows and write parts of its sums,
which the caller adds. No atomics.

The positives of a block of rows lie in one ``stretch`` of columns: other tiles do without their masks.

``own`` is the slot of the query itself where it is excluded (a constant pair, nobody's competitor), else -1; kernels
take it as ``self_slot``, None where no query is excluded.

Where scores are bounded (backends/triton/rank_sums.py), a sigmoid of a negative is one reciprocal (FACTORED). Of half
a score, s = 2^(-z_qj / 2) is taken once a tile, f = 2^(z_qi / 2) once a positive pair; of r = s f

    u(z_qj - z_qi) = 1 / (1 + r^2),        u' = (r u)^2

Neither cancels, and an r that overflows or vanishes gives the limits 0 and 1; exponentials of whole scores would leave
the range of float32 at a temperature of 0.01. ``roots`` (P,) holds f. Elsewhere each sigmoid takes an
exponential of its own, as those of positives, which are few, always do: u(0) is exactly 1/2.

The strip plan stores the scores of a strip of queries with the whole gallery. The kernels that sweep the gallery read
them where y is None, and ``rank_weights_kernel`` turns them into dS, which the caller multiplies by the rows.
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairwise import (
    LN2,
    add_weighted_rows,
    factored_sigmoid,
    factored_slope_root,
    owned_columns,
    owned_rows,
    score_tile,
    sigmoid2,
    sigmoid2_slope,
    slope_of_sigmoid2,
)

INF = tl.constexpr(float("inf"))

# Numbers that differ from batch to batch must not make new variants of a kernel.
VARYING = ("n", "m", "pairs", "first_column")


@triton.jit
def load_queries(row, start, size, first, self_slot):
    """start, size, first pair and own slot of queries ``row``."""
    begin = tl.load(start + row).to(tl.int32)
    own = tl.full(row.shape, -1, tl.int32)
    if self_slot is not None:
        own = tl.load(self_slot + row).to(tl.int32)
    return begin, tl.load(size + row).to(tl.int32), tl.load(first + row), own


@triton.jit
def load_slot(table, pair, count, own, slot, other):
    """What a table of pairs holds for one slot of each query; ``other`` where there is none, or it is its own."""
    return tl.load(table + pair + slot, mask=(slot < count) & (slot != own), other=other)


@triton.jit(do_not_specialize=VARYING)
def positive_scores_kernel(
    x, y, start, size, first, scale, scores, roots, n, m, width,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scores (P,): z of every positive pair, from the stretch of the gallery that the classes of a block span; where
    FACTORED, their roots too."""
    row, exists = owned_rows(n, BLOCK_M)
    begin, count, pair, _ = load_queries(row, start, size, first, None)
    scale = tl.load(scale)
    for low in range(tl.min(begin), tl.max(begin + count), BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        z = score_tile(x, y, row, tl.minimum(column, m - 1), width, scale, PRECISION, BLOCK_K)
        slot = column[None, :] - begin[:, None]
        wanted = (slot >= 0) & (slot < count[:, None]) & exists[:, None]
        target = pair[:, None] + slot
        tl.store(scores + target, z, mask=wanted)
        if FACTORED:
            tl.store(roots + target, tl.exp2(0.5 * z), mask=wanted)


@triton.jit
def stretch(start, size, n, low, BLOCK: tl.constexpr):
    """begin, end of the shortest stretch of the gallery that holds all positives of the queries low, ..., low + BLOCK,
    as far as there are n: those of the first and of the last, as they are sorted."""
    last = tl.minimum(low + BLOCK, n) - 1
    return tl.load(start + low).to(tl.int32), (tl.load(start + last) + tl.load(size + last)).to(tl.int32)


@triton.jit
def is_negative(slot, count):
    """Whether what stands ``slot`` places behind a query's first positive is none of its ``count`` positives."""
    return (slot < 0) | (slot >= count)


@triton.jit
def add_sums(
    total, slopes, z, scores, roots, pair, count, own, chunk, largest, SLOPES: tl.constexpr, FACTORED: tl.constexpr
):  # fmt: skip
    """total (M, CHUNK) + sums over the columns j of z (M, N) of u of z_qj - z_qi, for i in slots chunk, ...; SLOPES: of
    u' to ``slopes``. Sums for slots that a query lacks are finite."""
    slots = (chunk + tl.arange(0, total.shape[1]))[None, :]
    if FACTORED:
        s = tl.exp2(-0.5 * z)
    for i in range(chunk, tl.minimum(chunk + total.shape[1], largest)):
        here = tl.where(slots == i, 1.0, 0.0).to(total.dtype)
        if FACTORED:
            ratio = s * tl.load(roots + pair + i, mask=i < count, other=1.0)[:, None]
            u = factored_sigmoid(ratio, FACTORED)
        else:
            distance = z - load_slot(scores, pair, count, own, i, INF)[:, None]
            u = sigmoid2(distance)
        total += here * tl.sum(u, 1)[:, None]
        if SLOPES:
            if FACTORED:
                root = factored_slope_root(ratio, u, FACTORED)
                slope = root * root
            else:
                slope = slope_of_sigmoid2(distance, u)
            slopes += here * tl.sum(slope, 1)[:, None]
    return total, slopes


@triton.jit
def sum_negatives(
    x, y, scores, roots, row, begin, count, pair, own, chunk, lowest, highest, largest, m, width, scale,
    SLOPES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(M, CHUNK) sums of u, and of u' where SLOPES, of z_qj - z_qi over the negatives j among its columns."""
    total = tl.zeros((row.shape[0], CHUNK), dtype=scale.dtype)
    slopes = tl.zeros((row.shape[0], CHUNK), dtype=scale.dtype)
    low_column, high_column = owned_columns(m, 1, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        z = score_tile(x, y, row, tl.minimum(column, m - 1), width, scale, PRECISION, BLOCK_K)
        if ((low < highest) & (low + BLOCK_N > lowest)) | (low + BLOCK_N > m):
            negative = is_negative(column[None, :] - begin[:, None], count[:, None])
            z = tl.where(negative & (column < m)[None, :], z, -INF)
        total, slopes = add_sums(
            total, slopes, z, scores, roots, pair, count, own, chunk, largest, SLOPES, FACTORED
        )  # fmt: skip
    return total, slopes


@triton.jit(do_not_specialize=VARYING)
def rank_sums_kernel(
    x, y, start, size, first, self_slot, scale, scores, roots, rank_all, rank_pos, slopes, n, m, width, pairs,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rank_all, rank_pos and, unless it is None, slopes (parts, P), to be summed over the parts: grid axis 1 divides
    the competitors.

    Classes of any size are worked in chunks of positives, with a sweep of the gallery for each.
    """
    row, exists = owned_rows(n, BLOCK_M)
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    scale = tl.load(scale)
    lowest, highest = stretch(start, size, n, tl.program_id(0) * BLOCK_M, BLOCK_M)
    largest = tl.max(count)
    for chunk in range(0, largest, CHUNK):
        negatives, negative_slopes = sum_negatives(
            x, y, scores, roots, row, begin, count, pair, own, chunk, lowest, highest, largest, m, width, scale,
            slopes is not None, CHUNK, PRECISION, FACTORED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        i = (chunk + tl.arange(0, CHUNK))[None, :]
        z_i = load_slot(scores, pair[:, None], count[:, None], own[:, None], i, INF)
        positives = tl.zeros((BLOCK_M, CHUNK), dtype=scale.dtype)
        for j in range(part, largest, parts):
            positives += sigmoid2(load_slot(scores, pair, count, own, j, -INF)[:, None] - z_i)
        # j = i is among the summands with u(0) = 1/2 where the definition counts 1; the excluded pair holds 1 and 0
        once = tl.where(part == 0, 1.0, 0.0)
        excluded = i == own[:, None]
        positives = tl.where(excluded, 0.0, positives + 0.5 * once)
        target = part.to(tl.int64) * pairs + pair[:, None] + i
        wanted = (i < count[:, None]) & exists[:, None]
        tl.store(rank_pos + target, positives, mask=wanted)
        tl.store(rank_all + target, tl.where(excluded, once, positives + negatives), mask=wanted)
        if slopes is not None:
            tl.store(slopes + target, tl.where(excluded, 0.0, negative_slopes), mask=wanted)


@triton.jit(do_not_specialize=VARYING)
def positive_gradient_kernel(
    start, size, first, self_slot, scores, slopes, grad_all, grad_pos, grad_scores, n,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """grad_scores (P,): tau dS of every positive pair, 0 for the excluded one; grid axis 1 divides the slots."""
    row, exists = owned_rows(n, BLOCK_M)
    _, count, pair, own = load_queries(row, start, size, first, self_slot)
    largest = tl.max(count)
    for chunk in range(tl.program_id(1) * CHUNK, largest, tl.num_programs(1) * CHUNK):
        i = (chunk + tl.arange(0, CHUNK))[None, :]
        z_i = load_slot(scores, pair[:, None], count[:, None], own[:, None], i, INF)
        a_i = load_slot(grad_all, pair[:, None], count[:, None], own[:, None], i, 0.0)
        w_i = a_i + load_slot(grad_pos, pair[:, None], count[:, None], own[:, None], i, 0.0)
        total = -a_i * load_slot(slopes, pair[:, None], count[:, None], own[:, None], i, 0.0)
        for j in range(0, largest):
            z = load_slot(scores, pair, count, own, j, -INF)
            w = load_slot(grad_all, pair, count, own, j, 0.0) + load_slot(grad_pos, pair, count, own, j, 0.0)
            total += (w[:, None] - w_i) * sigmoid2_slope(z[:, None] - z_i)
        tl.store(grad_scores + pair[:, None] + i, total, mask=(i < count[:, None]) & exists[:, None])


@triton.jit
def add_slopes(
    t, z, scores, roots, grad_all, pair, count, own, largest, AXIS: tl.constexpr, FACTORED: tl.constexpr
):  # fmt: skip
    """t + sum over positives i of a_qi u'(z_qj - z_qi) for the z of pairs whose queries are the rows (AXIS 1) or the
    columns (AXIS 0); nothing where z is -infinity."""
    if FACTORED:
        s = tl.exp2(-0.5 * z)
    for i in range(0, largest):
        a_i = tl.expand_dims(load_slot(grad_all, pair, count, own, i, 0.0), AXIS)
        if FACTORED:
            ratio = s * tl.expand_dims(tl.load(roots + pair + i, mask=i < count, other=1.0), AXIS)
            root = factored_slope_root(ratio, factored_sigmoid(ratio, FACTORED), FACTORED)
            t += a_i * (root * root)
        else:
            z_i = tl.expand_dims(load_slot(scores, pair, count, own, i, INF), AXIS)
            t += a_i * sigmoid2_slope(z - z_i)
    return t


@triton.jit
def add_gradient(
    t, z, competitor, valid, touched, scores, roots, grad_all, grad_scores, begin, count, pair, own, largest,
    AXIS: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """t + tau dS of the pairs in z, queries along AXIS as in ``add_slopes``. ``touched``: whether some are positive, or
    not valid, whose dS is 0."""
    if touched:
        slot = competitor - tl.expand_dims(begin, AXIS)
        negative = is_negative(slot, tl.expand_dims(count, AXIS))
        z = tl.where(valid & negative, z, -INF)
        t += tl.load(grad_scores + tl.expand_dims(pair, AXIS) + slot, mask=valid & ~negative, other=0.0)
    return add_slopes(t, z, scores, roots, grad_all, pair, count, own, largest, AXIS, FACTORED)


@triton.jit(do_not_specialize=VARYING)
def rank_gradient_kernel(
    u, v, start, size, first, self_slot, scale, scores, roots, grad_all, grad_scores, du, n, m, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du (parts, n, width), to be summed over the parts: T v for rows u (n, width) and columns v (m, width).

    Queries are the rows (ROWS: T = dS, du = dX), the columns (COLUMNS: T = dS^T, du = dY), or both, where u is v. Grid
    axis 1 divides the features, SLICE a program; axis 2 the columns.
    """
    row, exists = owned_rows(n, BLOCK_M)
    low_row = tl.program_id(0) * BLOCK_M
    feature = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    scale = tl.load(scale)
    total = tl.zeros((BLOCK_M, SLICE), dtype=scale.dtype)
    if ROWS:
        begin, count, pair, own = load_queries(row, start, size, first, self_slot)
        lowest, highest = stretch(start, size, n, low_row, BLOCK_M)
        largest = tl.max(count)
    low_column, high_column = owned_columns(m, 2, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        valid = (column < m)[None, :]
        column = tl.minimum(column, m - 1)
        z = score_tile(u, v, row, column, width, scale, PRECISION, BLOCK_K)
        t = tl.zeros_like(z)
        last = low + BLOCK_N > m
        if ROWS:
            touched = ((low < highest) & (low + BLOCK_N > lowest)) | last
            t = add_gradient(
                t, z, column[None, :], valid, touched,
                scores, roots, grad_all, grad_scores, begin, count, pair, own, largest, 1, FACTORED,
            )  # fmt: skip
        if COLUMNS:
            begin_c, count_c, pair_c, own_c = load_queries(column, start, size, first, self_slot)
            lowest_c, highest_c = stretch(start, size, m, low, BLOCK_N)
            touched_c = ((low_row < highest_c) & (low_row + BLOCK_M > lowest_c)) | last
            t = add_gradient(
                t, z, row[:, None], valid, touched_c,
                scores, roots, grad_all, grad_scores, begin_c, count_c, pair_c, own_c, tl.max(count_c), 0, FACTORED,
            )  # fmt: skip
        total = add_weighted_rows(total, t, v, column, feature, width, PRECISION)
    target = du + (tl.program_id(2).to(tl.int64) * n + row)[:, None] * width + feature[None, :]
    tl.store(target, total * (scale * LN2), mask=exists[:, None] & (feature < width)[None, :])


@triton.jit(do_not_specialize=VARYING)
def rank_weights_kernel(
    x, y, weights, start, size, first, self_slot, scale, unit, scores, roots, grad_all, grad_scores,
    first_column, n, m, width, stride,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weights (n, m), rows ``stride`` apart: ``unit`` times tau dS of queries x with the columns of the gallery from
    first_column on, which are y; of stored scores x, perhaps in their place, where y is None. Grid axis 1 divides them.

    Positives, whose slots would cost each tile registers, are stored when it is done: all their own programs'.
    """
    row, exists = owned_rows(n, BLOCK_M)
    begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    begin -= first_column
    lowest, highest = stretch(start, size, n, tl.program_id(0) * BLOCK_M, BLOCK_M)
    largest = tl.max(count)
    scale, unit = tl.load(scale), tl.load(unit)
    target = weights + row.to(tl.int64)[:, None] * stride
    padded_m = tl.cdiv(m, 16) * 16
    low_column, high_column = owned_columns(m, 1, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        z = score_tile(x, y, row, tl.minimum(column, m - 1), width, scale, PRECISION, BLOCK_K)
        t = add_slopes(tl.zeros_like(z), z, scores, roots, grad_all, pair, count, own, largest, 1, FACTORED)
        dtype = weights.dtype.element_ty
        dS = (t * unit).to(dtype)
        if (first_column + low < highest) & (first_column + low + BLOCK_N > lowest):
            negative = is_negative(column[None, :] - begin[:, None], count[:, None])
            tl.store(target + column[None, :], dS, mask=negative & exists[:, None] & (column < m)[None, :])
        else:
            tl.store(target + column[None, :], dS, mask=exists[:, None] & (column < padded_m)[None, :])
    for low in range(0, largest, CHUNK):
        slot = low + tl.arange(0, CHUNK)[None, :]
        column = begin[:, None] + slot
        wanted = exists[:, None] & (slot < count[:, None]) & (column >= low_column) & (column < high_column)
        t = tl.load(grad_scores + pair[:, None] + slot, mask=wanted, other=0.0)
        tl.store(target + column, (t * unit).to(weights.dtype.element_ty), mask=wanted)
