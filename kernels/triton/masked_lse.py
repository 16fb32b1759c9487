"""masked_lse: log-sum-exp and target score of every row, or column, of a masked pair matrix, and their gradients.

With logits l_ij = scale s_ij + a_i + b_j of s = X Y^T, a head over rows has

    lse_i = c_i + log sum over allowed j of exp(l_ij - c_i),      c_i = max l_ij,          t_i = sum over j of Y_ij l_ij

(one over columns: sums over i; one with a phi: the sum of phi(l_ij) takes the place of lse, phi' that of P). A program
owns rows u of the side that the results belong to, and sweeps the rows v of the other; c and the sum are brought up to
date tile by tile. Backward recomputes tiles of S for all heads at once,

    W = g P + h Y,      T = sum over heads of scale W,      du = T v

and sums of W, and of W s, along the program's rows: the gradients of biases and, once added up, of the scale. A
program writes rows that it alone owns. Where too few would run, several share a block of rows and write parts of its
sums: those of forward are merged by the last program of a block to arrive, in the order of the parts, so that nothing
depends on which one it is; those of backward, whose parts are as wide as the rows, by the caller, who has the whole GPU
for it. The only atomics count arrivals.

TRANSPOSED gives programs that own columns the tile (rows, columns) that those owning rows have, turned round: masks by
threshold need the same bits in every launch, and so the same tile of the pair matrix everywhere.

Forward takes two heads from one product. Of heads over different sides, programs own the lines of one, and leave for
the other a sum of every block of lines and line across, which the caller merges in a fixed order.

Programs that run together own successive blocks of rows and sweep the columns in step: a tile of columns comes from
memory once for all of them, and from L2 for each. Rows of a block, which every tile reads again, stay in L2 for as long
as those of all programs at once fit: 132 blocks of 128 rows of 768 bfloat16 features are 25 MiB.

Columns may lie in memory as they are, M much larger than N and never copied: a head then has their norms n, and

    s_ij = <u_i, y_j> / n_j,      T_ij = dS_ij / n_j,      du = T y,      T^T u = the gradient of unit y, over n

The other two plans store T for a block of rows and columns, and the caller multiplies it: ``masked_lse_weights_kernel``
makes it of rows, or where v is None of scores that the strip plan stores, as ``masked_lse_kernel`` then reads them.
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairs import allowed, logits, over_norms, pair_weights, target_weights
from fastret.kernels.triton.pairwise import (
    LN2,
    add_weighted_rows,
    columns_of,
    dot_tile,
    exponential,
    last_to_arrive,
    owned_columns,
    owned_rows,
    stored_tile,
)
from fastret.kernels.triton.phi import phi_value

INF = tl.constexpr(float("inf"))

# Numbers that differ from batch to batch must not make new variants of a kernel.
VARYING = ("n", "m", "first_column")


@triton.jit
def own_tile(
    u, v, own, other, width, dtype: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(M, N) dot products <u_own, v_other>, or of stored scores u, where v is None, those of the program's own."""
    if TRANSPOSED and v is None:
        return stored_tile(u, other[None, :], own[:, None], width)
    elif TRANSPOSED:
        return tl.trans(dot_tile(v, u, other, own, width, dtype, PRECISION, BLOCK_K))
    else:
        return dot_tile(u, v, own, other, width, dtype, PRECISION, BLOCK_K)


@triton.jit
def add_exponentials(high, total, z):
    """The largest of (M, N) logits z and of ``high`` (M,), and the sum of exp(z - it): 0 while all are -inf."""
    highest = tl.maximum(high, tl.max(z, 1))
    safe = tl.where(highest == -INF, 0.0, highest)
    return highest, total * exponential(high - safe) + tl.sum(exponential(z - safe[:, None]), 1)


@triton.jit
def summed(head, high, total):
    """What a head's running maximum and sum come to: their lse, or the sum itself where a phi is summed."""
    if head.reduce == "lse":
        return tl.where(high == -INF, 0.0, high) + tl.log2(total) * LN2
    else:
        return total


@triton.jit
def add_pairs(head, s, i, j, first_column, valid, high, total, score):
    """A head's running maximum, sum and target score (M,) with those of the ``valid`` pairs of a tile added."""
    z = logits(head, s, i, j)
    ok = allowed(head.mask, s, i, j, first_column, valid)
    if head.reduce == "lse":
        high, total = add_exponentials(high, total, tl.where(ok, z, -INF))
    else:
        total += tl.sum(tl.where(ok, phi_value(head.reduce, z), 0.0), 1)
    if head.scored:
        y = target_weights(head, s, i, j, first_column, valid)
        score += tl.sum(tl.where(valid, y * z, 0.0), 1)
    return high, total, score


@triton.jit
def store_across(head, s, i, j, first_column, valid, lse, t, place, exists):
    """What the ``valid`` pairs of a tile come to in a head over its columns."""
    z = logits(head, s, i, j)
    ok = allowed(head.mask, s, i, j, first_column, valid)
    if head.reduce == "lse":
        z_ok = tl.where(ok, z, -INF)
        high = tl.max(z_ok, 0)
        safe = tl.where(high == -INF, 0.0, high)
        tl.store(lse + place, safe + tl.log2(tl.sum(exponential(z_ok - safe[None, :]), 0)) * LN2, mask=exists)
    else:
        tl.store(lse + place, tl.sum(tl.where(ok, phi_value(head.reduce, z), 0.0), 0), mask=exists)
    if head.scored:
        y = target_weights(head, s, i, j, first_column, valid)
        tl.store(t + place, tl.sum(tl.where(valid, y * z, 0.0), 0), mask=exists)


@triton.jit
def store_merged(head, lse, t, own, exists, n, part, step, BLOCK_M: tl.constexpr):
    """Sums of a head from those of all programs along axis 1, ``step`` apart from ``part`` on, in their order."""
    dtype: tl.constexpr = lse.dtype.element_ty
    high = tl.full((BLOCK_M,), -INF, dtype)
    total = tl.zeros((BLOCK_M,), dtype)
    score = tl.zeros((BLOCK_M,), dtype)
    place = part + own
    for _ in range(0, tl.num_programs(1)):
        value = tl.load(place)
        if head.reduce == "lse":
            high, total = add_exponentials(high, total, value[:, None])
        else:
            total += value
        if head.scored:
            score += tl.load(place + n)
        place += step
    tl.store(lse + own, summed(head, high, total), mask=exists)
    tl.store(t + own, score, mask=exists)


@triton.jit
def store_part(head, high, total, score, part, own, exists, n):
    tl.store(part + own, summed(head, high, total), mask=exists)
    if head.scored:
        tl.store(part + n + own, score, mask=exists)


@triton.jit(do_not_specialize=("head", "second", *VARYING))
def masked_lse_kernel(
    u, v, head, lse, t, second, second_lse, second_t, parts, arrived, n, m, width, first_column,
    SECOND: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """lse, or the sum of a phi, and t (n,) of one head: grid axis 1 divides the other side. SECOND: "" or where a
    second head has its results: "along" the same side, or "across", then (blocks of rows, m) for the caller to merge.

    parts, arrived: room for (programs along axis 1, 2 a head along, n) of the same and zeros (blocks of rows,), int32;
    None where axis 1 has one program.
    """
    own, exists = owned_rows(n, BLOCK_M)
    dtype: tl.constexpr = lse.dtype.element_ty
    high = tl.full((BLOCK_M,), -INF, dtype)
    total = tl.zeros((BLOCK_M,), dtype)
    score = tl.zeros((BLOCK_M,), dtype)
    second_high = tl.full((BLOCK_M,), -INF, dtype)
    second_total = tl.zeros((BLOCK_M,), dtype)
    second_score = tl.zeros((BLOCK_M,), dtype)
    begin, end = owned_columns(m, 1, BLOCK_N)
    for low in range(begin, end, BLOCK_N):
        other = tl.minimum(low + tl.arange(0, BLOCK_N), m - 1)
        tile = own_tile(u, v, own, other, width, dtype, TRANSPOSED, PRECISION, BLOCK_K)
        for p in tl.static_range(PIECES):
            s = columns_of(tile, p, PIECES)
            column = low + p * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            valid = (column < m)[None, :]
            other = tl.minimum(column, m - 1)
            i = own[:, None] if head.axis == "row" else other[None, :]
            j = other[None, :] if head.axis == "row" else own[:, None]
            s = over_norms(head, s, j)
            high, total, score = add_pairs(head, s, i, j, first_column, valid, high, total, score)
            if SECOND == "along":
                second_high, second_total, second_score = add_pairs(
                    second, s, i, j, first_column, valid, second_high, second_total, second_score
                )
            if SECOND == "across":
                place = tl.program_id(0).to(tl.int64) * m + other
                there = valid & exists[:, None]
                store_across(second, s, i, j, first_column, there, second_lse, second_t, place, column < m)
    if arrived is None:
        tl.store(lse + own, summed(head, high, total), mask=exists)
        tl.store(t + own, score, mask=exists)
        if SECOND == "along":
            tl.store(second_lse + own, summed(second, second_high, second_total), mask=exists)
            tl.store(second_t + own, second_score, mask=exists)
    else:
        step = n * (4 if SECOND == "along" else 2)
        part = parts + tl.program_id(1).to(tl.int64) * step
        store_part(head, high, total, score, part, own, exists, n)
        if SECOND == "along":
            store_part(second, second_high, second_total, second_score, part + step // 2, own, exists, n)
        if last_to_arrive(arrived, 1):
            store_merged(head, lse, t, own, exists, n, parts, step, BLOCK_M)
            if SECOND == "along":
                store_merged(second, second_lse, second_t, own, exists, n, parts + step // 2, step, BLOCK_M)


@triton.jit
def add_to_slot(total, values, k: tl.constexpr):
    """total (M, SLOTS), of which the k-th column has values (M,) added."""
    return total + tl.where(tl.arange(0, total.shape[1])[None, :] == k, values[:, None], 0.0)


@triton.jit
def store_sums(target, total, own, exists, n, HEADS: tl.constexpr):
    """Sums (M, SLOTS) to target (parts, HEADS, n), once for all programs that share the rows."""
    slot = tl.arange(0, total.shape[1])[None, :]
    row = (tl.program_id(2) * HEADS + slot).to(tl.int64) * n + own[:, None]
    tl.store(target + row, total, mask=exists[:, None] & (slot < HEADS) & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=("heads", *VARYING))
def masked_lse_gradient_kernel(
    u, v, heads, du, row_sums, column_sums, score_sums, n, m, width, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du (parts, n, width) and sums (parts, HEADS, n), each where it is wanted, to be summed over the parts.

    u are the rows (ROWS: T = dS), the columns (COLUMNS: T = dS^T), or both, where u is v. row_sums and column_sums
    are of W, score_sums of W s. Grid axis 1 divides the features, SLICE a program; axis 2 the other side. SLOTS: HEADS
    and what lacks to a power of two.
    """
    own, exists = owned_rows(n, BLOCK_M)
    feature = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    dtype: tl.constexpr = heads[0].scale.dtype.element_ty
    total = tl.zeros((BLOCK_M, SLICE), dtype)
    of_rows = tl.zeros((BLOCK_M, SLOTS), dtype)
    of_columns = tl.zeros((BLOCK_M, SLOTS), dtype)
    of_scores = tl.zeros((BLOCK_M, SLOTS), dtype)
    begin, end = owned_columns(m, 2, BLOCK_N)
    for low in range(begin, end, BLOCK_N):
        other = low + tl.arange(0, BLOCK_N)
        valid = (other < m)[None, :]
        other = tl.minimum(other, m - 1)
        column = other[None, :] if ROWS else own[:, None]  # which may have norms where there are rows beside them
        s = own_tile(u, v, own, other, width, dtype, TRANSPOSED, PRECISION, BLOCK_K)
        s = over_norms(heads[0], s, column)
        t = tl.zeros_like(s)
        for k in tl.static_range(HEADS):
            if ROWS:
                w = pair_weights(heads[k], s, own[:, None], other[None, :], first_column, valid)
                t += w * tl.load(heads[k].scale)
                if row_sums is not None:
                    of_rows = add_to_slot(of_rows, tl.sum(w, 1), k)
                if score_sums is not None:
                    of_scores = add_to_slot(of_scores, tl.sum(w * s, 1), k)
            if COLUMNS:
                w = pair_weights(heads[k], s, other[None, :], own[:, None], first_column, valid)
                t += w * tl.load(heads[k].scale)
                if column_sums is not None:
                    of_columns = add_to_slot(of_columns, tl.sum(w, 1), k)
                if not ROWS and score_sums is not None:
                    of_scores = add_to_slot(of_scores, tl.sum(w * s, 1), k)
        if du is not None:
            total = add_weighted_rows(total, over_norms(heads[0], t, column), v, other, feature, width, PRECISION)
    if du is not None:
        target = du + (tl.program_id(2).to(tl.int64) * n + own)[:, None] * width + feature[None, :]
        tl.store(target, total, mask=exists[:, None] & (feature < width)[None, :])
    if row_sums is not None:
        store_sums(row_sums, of_rows, own, exists, n, HEADS)
    if column_sums is not None:
        store_sums(column_sums, of_columns, own, exists, n, HEADS)
    if score_sums is not None:
        store_sums(score_sums, of_scores, own, exists, n, HEADS)


@triton.jit
def added(sums, values, k: tl.constexpr):
    """Two sums, to one of which values (M,) are added, in registers as a product has them."""
    if k == 0:
        return sums[0] + values, sums[1]
    else:
        return sums[0], sums[1] + values


@triton.jit
def store_each(target, sums, own, exists, n, HEADS: tl.constexpr):
    """Sums, a tuple of (M,), to target (parts, HEADS, n)."""
    for k in tl.static_range(HEADS):
        row = (tl.program_id(2) * HEADS + k).to(tl.int64) * n + own
        tl.store(target + row, sums[k], mask=exists)


@triton.jit(do_not_specialize=("heads", *VARYING))
def masked_lse_weights_kernel(
    u, v, heads, weights, unit, row_sums, column_sums, score_sums, n, m, width, stride, first_column,
    PRECISION: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """weights (n, m), ``stride`` apart, = T, times *unit where there is one, of rows u and columns v; where v is None
    of stored scores u, ``width`` apart, which may be the same place. With the sums that are wanted: of W and W s along
    rows (parts, HEADS, n), to be summed over the parts, grid axis 2; of W along columns (blocks, HEADS, m), to be
    summed over the blocks of rows, grid axis 0. Grid axis 1 is 1.
    """
    own, exists = owned_rows(n, BLOCK_M)
    dtype: tl.constexpr = heads[0].scale.dtype.element_ty
    none = tl.zeros((BLOCK_M,), dtype)
    of_rows = (none, none)
    of_scores = (none, none)
    begin, end = owned_columns(m, 2, BLOCK_N)
    for low in range(begin, end, BLOCK_N):
        if v is not None:
            tile = dot_tile(u, v, own, tl.minimum(low + tl.arange(0, BLOCK_N), m - 1), width, dtype, PRECISION, BLOCK_K)
        for p in tl.static_range(PIECES):
            other = low + p * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            there = (other < m)[None, :] & exists[:, None]
            column = tl.minimum(other, m - 1)
            if v is None:
                s = tl.load(u + own.to(tl.int64)[:, None] * width + other[None, :], mask=there, other=0.0)
            else:
                s = columns_of(tile, p, PIECES)
            s = over_norms(heads[0], s, column[None, :])
            t = tl.zeros_like(s)
            for k in tl.static_range(HEADS):
                w = pair_weights(heads[k], s, own[:, None], column[None, :], first_column, there)
                t += w * tl.load(heads[k].scale)
                if row_sums is not None:
                    of_rows = added(of_rows, tl.sum(w, 1), k)
                if score_sums is not None:
                    of_scores = added(of_scores, tl.sum(w * s, 1), k)
                if column_sums is not None:
                    target = column_sums + (tl.program_id(0) * HEADS + k).to(tl.int64) * m + other
                    tl.store(target, tl.sum(w, 0), mask=other < m)
            if weights is not None:
                t = over_norms(heads[0], t, column[None, :])
                if unit is not None:
                    t = t * tl.load(unit)
                place = own.to(tl.int64)[:, None] * stride + other[None, :]
                tl.store(weights + place, t.to(weights.dtype.element_ty), mask=there)
    if row_sums is not None:
        store_each(row_sums, of_rows, own, exists, n, HEADS)
    if score_sums is not None:
        store_each(score_sums, of_scores, own, exists, n, HEADS)
