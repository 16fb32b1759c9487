"""rank_sums: sums of sigmoids over the gallery for each query's positives, and the gradient of any function of them.

Rows come sorted by class, so the positives of query q are the gallery rows [start_q, start_q + size_q), a short stretch
of its row of S. Pair (q, i) is number first_q + i - start_q of P; i - start_q is its slot. z_qj = s_qj log2(e) / tau:

    rank_pos[q, i] = 1 + sum over positives j != i of u(z_qj - z_qi),         u(z) = 1 / (1 + 2^-z)
    rank_all[q, i] = rank_pos[q, i] + sum over negatives j of u(z_qj - z_qi)

Negatives come from tiles of S in which positives are masked out; positives from a table of the P positive scores, so
that j = i is exact. Backward, for upstream gradients a = d/d rank_all, b = d/d rank_pos and w = a + b, u' = u (1 - u):

    tau dS_qi = sum over positives j of (w_qj - w_qi) u'(z_qj - z_qi) - a_qi sum over negatives j of u'(z_qj - z_qi)
    tau dS_qj = sum over positives i of a_qi u'(z_qj - z_qi)                                           for negatives j

The first line is again a table of P numbers. The second is recomputed tile by tile and multiplied by the rows at once:
dX = dS Y, dY = dS^T X; gallery = batch: dX = (dS + dS^T) X. A program writes rows that it alone owns; where too few
would run, several share a block of rows and write parts of its sums, which the caller adds. No atomics.

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
)

INF = tl.constexpr(float("inf"))

# Numbers that differ from batch to batch must not make new variants of a kernel.
VARYING = ("n", "m", "pairs")


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
def add_sums(total, z, scores, pair, count, own, chunk, largest, SLOPE: tl.constexpr):
    """total (M, CHUNK) + sums over the columns j of z (M, N) of u, or u', of z_qj - z_qi, for i in slots chunk, ..."""
    slots = (chunk + tl.arange(0, total.shape[1]))[None, :]
    for i in range(chunk, tl.minimum(chunk + total.shape[1], largest)):
        distance = z - load_slot(scores, pair, count, own, i, INF)[:, None]
        u = sigmoid2_slope(distance) if SLOPE else sigmoid2(distance)
        total += tl.where(slots == i, tl.sum(u, 1)[:, None], 0.0)
    return total


@triton.jit
def add_factored_sums(
    total, z, roots, pair, count, chunk, largest, SLOPE: tl.constexpr, FACTORED: tl.constexpr
):  # fmt: skip
    """``add_sums`` with one reciprocal a summand; sums for slots that a query lacks are finite."""
    slots = (chunk + tl.arange(0, total.shape[1]))[None, :]
    s = tl.exp2(-0.5 * z)
    for i in range(chunk, tl.minimum(chunk + total.shape[1], largest)):
        ratio = s * tl.load(roots + pair + i, mask=i < count, other=1.0)[:, None]
        if SLOPE:
            root = factored_slope_root(ratio, FACTORED)
            u = root * root
        else:
            u = factored_sigmoid(ratio, FACTORED)
        total += tl.where(slots == i, tl.sum(u, 1)[:, None], 0.0)
    return total


@triton.jit
def sum_negatives(
    x, y, scores, roots, row, begin, count, pair, own, chunk, largest, m, width, scale,
    SLOPE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(M, CHUNK) sums of u, or u', of z_qj - z_qi over the negatives j among this program's columns."""
    total = tl.zeros((row.shape[0], CHUNK), dtype=scale.dtype)
    low_column, high_column = owned_columns(m, 1, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        z = score_tile(x, y, row, tl.minimum(column, m - 1), width, scale, PRECISION, BLOCK_K)
        slot = column[None, :] - begin[:, None]
        negative = ((slot < 0) | (slot >= count[:, None])) & (column < m)[None, :]
        z = tl.where(negative, z, -INF)
        if FACTORED:
            total = add_factored_sums(total, z, roots, pair, count, chunk, largest, SLOPE, FACTORED)
        else:
            total = add_sums(total, z, scores, pair, count, own, chunk, largest, SLOPE)
    return total


@triton.jit(do_not_specialize=VARYING)
def rank_sums_kernel(
    x, y, start, size, first, self_slot, scale, scores, roots, rank_all, rank_pos, n, m, width, pairs,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rank_all, rank_pos (parts, P), to be summed over the parts: grid axis 1 divides the competitors.

    Classes of any size are worked in chunks of positives, with a sweep of the gallery for each.
    """
    row, exists = owned_rows(n, BLOCK_M)
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    scale = tl.load(scale)
    largest = tl.max(count)
    for chunk in range(0, largest, CHUNK):
        negatives = sum_negatives(
            x, y, scores, roots, row, begin, count, pair, own, chunk, largest, m, width, scale,
            False, CHUNK, PRECISION, FACTORED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        positives = tl.zeros((BLOCK_M, CHUNK), dtype=scale.dtype)
        for low in range(part * CHUNK, largest, parts * CHUNK):
            j = (low + tl.arange(0, CHUNK))[None, :]
            z = load_slot(scores, pair[:, None], count[:, None], own[:, None], j, -INF)
            positives = add_sums(positives, z, scores, pair, count, own, chunk, largest, False)
        # j = i is among the summands with u(0) = 1/2 where the definition counts 1; the excluded pair holds 1 and 0
        once = tl.where(part == 0, 1.0, 0.0)
        i = (chunk + tl.arange(0, CHUNK))[None, :]
        excluded = i == own[:, None]
        positives = tl.where(excluded, 0.0, positives + 0.5 * once)
        target = part.to(tl.int64) * pairs + pair[:, None] + i
        wanted = (i < count[:, None]) & exists[:, None]
        tl.store(rank_pos + target, positives, mask=wanted)
        tl.store(rank_all + target, tl.where(excluded, once, positives + negatives), mask=wanted)


@triton.jit(do_not_specialize=VARYING)
def pair_gradient_kernel(
    x, y, start, size, first, self_slot, scale, scores, roots, grad_all, grad_pos, grad_scores, n, m, width, pairs,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, FACTORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_scores (parts, P), to be summed over the parts: tau dS of every positive pair, 0 for the excluded one."""
    row, exists = owned_rows(n, BLOCK_M)
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    scale = tl.load(scale)
    largest = tl.max(count)
    for chunk in range(0, largest, CHUNK):
        negatives = sum_negatives(
            x, y, scores, roots, row, begin, count, pair, own, chunk, largest, m, width, scale,
            True, CHUNK, PRECISION, FACTORED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        slots = (chunk + tl.arange(0, CHUNK))[None, :]
        positives = tl.zeros((BLOCK_M, CHUNK), dtype=scale.dtype)
        for low in range(part * CHUNK, largest, parts * CHUNK):
            j = (low + tl.arange(0, CHUNK))[None, :]
            z = load_slot(scores, pair[:, None], count[:, None], own[:, None], j, -INF)
            w = load_slot(grad_all, pair[:, None], count[:, None], own[:, None], j, 0.0)
            w += load_slot(grad_pos, pair[:, None], count[:, None], own[:, None], j, 0.0)
            for i in range(chunk, tl.minimum(chunk + CHUNK, largest)):
                slope = sigmoid2_slope(z - load_slot(scores, pair, count, own, i, INF)[:, None])
                w_i = load_slot(grad_all, pair, count, own, i, 0.0) + load_slot(grad_pos, pair, count, own, i, 0.0)
                positives += tl.where(slots == i, tl.sum((w - w_i[:, None]) * slope, 1)[:, None], 0.0)
        a = load_slot(grad_all, pair[:, None], count[:, None], own[:, None], slots, 0.0)
        target = part.to(tl.int64) * pairs + pair[:, None] + slots
        wanted = (slots < count[:, None]) & exists[:, None]
        tl.store(grad_scores + target, positives - a * negatives, mask=wanted)


@triton.jit
def add_gradient(
    t, z, competitor, valid, scores, roots, grad_all, grad_scores, begin, count, pair, own,
    AXIS: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """t + tau dS of the pairs in z, whose queries are its rows (AXIS 1) or its columns (AXIS 0)."""
    slot = competitor - tl.expand_dims(begin, AXIS)
    positive = (slot >= 0) & (slot < tl.expand_dims(count, AXIS))
    z = tl.where(valid & ~positive, z, -INF)
    if FACTORED:
        s = tl.exp2(-0.5 * z)
        for i in range(0, tl.max(count)):
            f = tl.load(roots + pair + i, mask=i < count, other=1.0)
            a_i = load_slot(grad_all, pair, count, own, i, 0.0)
            root = factored_slope_root(s * tl.expand_dims(f, AXIS), FACTORED)
            t += tl.expand_dims(a_i, AXIS) * root * root
    else:
        for i in range(0, tl.max(count)):
            z_i = load_slot(scores, pair, count, own, i, INF)
            a_i = load_slot(grad_all, pair, count, own, i, 0.0)
            t += tl.expand_dims(a_i, AXIS) * sigmoid2_slope(z - tl.expand_dims(z_i, AXIS))
    return t + tl.load(grad_scores + tl.expand_dims(pair, AXIS) + slot, mask=valid & positive, other=0.0)


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
    feature = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    scale = tl.load(scale)
    total = tl.zeros((BLOCK_M, SLICE), dtype=scale.dtype)
    if ROWS:
        begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    low_column, high_column = owned_columns(m, 2, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        valid = (column < m)[None, :]
        column = tl.minimum(column, m - 1)
        z = score_tile(u, v, row, column, width, scale, PRECISION, BLOCK_K)
        t = tl.zeros_like(z)
        if ROWS:
            t = add_gradient(
                t, z, column[None, :], valid,
                scores, roots, grad_all, grad_scores, begin, count, pair, own, 1, FACTORED,
            )  # fmt: skip
        if COLUMNS:
            begin_c, count_c, pair_c, own_c = load_queries(column, start, size, first, self_slot)
            t = add_gradient(
                t, z, row[:, None], valid,
                scores, roots, grad_all, grad_scores, begin_c, count_c, pair_c, own_c, 0, FACTORED,
            )  # fmt: skip
        total = add_weighted_rows(total, t, v, column, feature, width, PRECISION)
    target = du + (tl.program_id(2).to(tl.int64) * n + row)[:, None] * width + feature[None, :]
    tl.store(target, total * (scale * LN2), mask=exists[:, None] & (feature < width)[None, :])


@triton.jit(do_not_specialize=VARYING)
def rank_weights_kernel(
    strip, weights, start, size, first, self_slot, scale, scores, roots, grad_all, grad_scores, n, m, width,
    FACTORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weights = dS of the stored scores (n, m) of queries, both ``width`` apart, and in place where they are the same;
    grid axis 1 divides the gallery."""
    row, exists = owned_rows(n, BLOCK_M)
    begin, count, pair, own = load_queries(row, start, size, first, self_slot)
    scale = tl.load(scale)
    low_column, high_column = owned_columns(m, 1, BLOCK_N)
    for low in range(low_column, high_column, BLOCK_N):
        column = (low + tl.arange(0, BLOCK_N))[None, :]
        valid = (column < m) & exists[:, None]
        place = row.to(tl.int64)[:, None] * width + column
        z = tl.load(strip + place, mask=valid, other=0.0) * scale
        t = tl.zeros_like(z)
        t = add_gradient(
            t, z, column, valid, scores, roots, grad_all, grad_scores, begin, count, pair, own, 1, FACTORED
        )
        tl.store(weights + place, (t * (scale * LN2)).to(weights.dtype.element_ty), mask=valid)
