"""soft_assign: attention of the parts of rows over the words of their books, and its gradients.

With scores u_nmk = <x_nm, w_mk> + b_mk, or given ones, p the softmax of u over k, and p' its upstream derivative,

    soft_nm = sum over k of p_nmk c_mk       usage_mk = sum over n of p_nmk       purity_nm = sum over k of p_nmk^2
    p'_nmk = <G_nm, c_mk> + usage'_mk + 2 purity'_nm p_nmk       r_nm = sum over k of p_nmk p'_nmk
    du = p (p' - r),      dx_nm = sum over k of du_nmk w_mk,     dw_mk = sum over n of du_nmk x_nm,     db = sum du

Row n of book m is number n books + m of x, lse, codes; word k of it number m words + k of keys and codebook. Grid axis
0 divides rows (words), axis 1 are the books. Programs that own rows sweep the words of the book: forward once, for a
running softmax, backward twice, for r and then for dx. Programs that own words sweep the rows, and write parts of their
sums where several share the words; the caller adds them. A program writes what it alone owns. No atomics.

Where scores are large their lse is rounded, and p is not quite normalised: r is divided by the sum of p, without which
a common part of p' would leave its trace in du.

Keys, biases and codebook come in the dtype of accumulation, and half-precision rows are exact: where digits would
cancel (scores, p', dw beside db) the factor that is not such a row is the sum of two numbers of 8 bits, a product each.
Other weights are rounded to the dtype of the rows, as everywhere. A score is the same in all kernels: a tile is always
(rows, words).

Predicted, not yet run on a GPU: N M K L multiply-adds 2 times forward (3 with usage) and 9 backward (5 of the rows'
side, 4 of the words'), N M K exponentials 1 (2) and 3 times; of memory the rows, their gradients and 12 bytes a part.
N = 4096, M = 8, K = 256, L = 16: 134 M multiply-adds a product, 8.4 M exponentials a sweep (2 us of an H100's), 4 MB.
In bfloat16 that is 8 us of tensor cores (19 products) and 9 us of exponentials, about 20 us with launches; in float32,
which is IEEE and on the ordinary units, at least 44 us of multiply-adds.
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairwise import LN2, add_weighted, exponential, owned_columns, owned_rows

INF = tl.constexpr(float("inf"))


@triton.jit
def load_rows(table, number, WIDTH: tl.constexpr, SLICE: tl.constexpr):
    """(M, SLICE) rows ``number`` (M,), int64, of a table (rows, WIDTH), with 0 beyond the width; zeros of None."""
    if table is None:
        return tl.zeros((number.shape[0], SLICE), tl.float32)
    else:
        feature = tl.arange(0, SLICE)[None, :]
        return tl.load(table + number[:, None] * WIDTH + feature, mask=feature < WIDTH, other=0.0)


@triton.jit
def store_rows(table, number, rows, exists, WIDTH: tl.constexpr):
    """What ``load_rows`` loads, where it ``exists``."""
    feature = tl.arange(0, rows.shape[1])[None, :]
    target = table + number[:, None] * WIDTH + feature
    tl.store(target, rows.to(table.dtype.element_ty), mask=exists[:, None] & (feature < WIDTH))


@triton.jit
def halves(t, dtype: tl.constexpr):
    """Two operands of products with half-precision rows, the sum of which is t to 16 bits or more."""
    high = t.to(tl.bfloat16)
    low = t - high.to(t.dtype)
    if dtype == tl.bfloat16:
        return high, low.to(dtype)
    else:  # TF32 holds float16 rows and what bfloat16 does
        return high.to(t.dtype), low


@triton.jit
def table_products(rows, table):
    """(M, N) products of rows (M, F) as they are stored with a table (N, F) in the dtype of accumulation."""
    if rows.dtype.primitive_bitwidth == 16:
        high, low = halves(table, rows.dtype)
        rows = rows.to(high.dtype)
        total = tl.dot(rows, tl.trans(low), input_precision="tf32")
        return tl.dot(rows, tl.trans(high), total, input_precision="tf32")
    else:
        return tl.dot(rows, tl.trans(table), input_precision="ieee", out_dtype=table.dtype)


@triton.jit
def add_exactly_weighted(total, weights, rows):
    """``add_weighted`` with weights of 16 bits or more."""
    if rows.dtype.primitive_bitwidth == 16:
        high, low = halves(weights, rows.dtype)
        total = add_weighted(total, low, rows, rows.dtype, "ieee")
        return add_weighted(total, high, rows, rows.dtype, "ieee")
    else:
        return add_weighted(total, weights, rows, rows.dtype, "ieee")


@triton.jit
def word_scores(part, key, bias, logits, number, word, words, dtype: tl.constexpr):
    """u (M, N) of existing parts and words ``word`` (N,); -inf where there is no such word."""
    book = tl.program_id(1)
    valid = (word < words)[None, :]
    word = tl.minimum(word, words - 1)
    if logits is not None:
        score = tl.load(logits + number[:, None] * words + word[None, :]).to(dtype)
    else:
        score = table_products(part, key)
        if bias is not None:
            score += tl.load(bias + book * words + word)[None, :]
    return tl.where(valid, score, -INF)


@triton.jit
def upstream_rows(grad_soft, grad_hard, number, STRAIGHT: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr):
    """G: upstream of soft, and of hard where that counts as soft."""
    if STRAIGHT and grad_soft is not None:
        g = load_rows(grad_soft, number, WIDTH, SLICE)
        h = load_rows(grad_hard, number, WIDTH, SLICE)
        wide: tl.constexpr = tl.float64 if h.dtype == tl.float64 else tl.float32
        return (g.to(wide) + h.to(wide)).to(h.dtype)
    elif STRAIGHT:
        return load_rows(grad_hard, number, WIDTH, SLICE)
    else:
        return load_rows(grad_soft, number, WIDTH, SLICE)


@triton.jit
def upstream_slopes(p, g, code, grad_usage, grad_purity, number, word, words, SMOOTH: tl.constexpr):
    """p' (M, N). SMOOTH: whether there is a G."""
    slope = tl.zeros_like(p)
    if SMOOTH:
        slope += table_products(g, code)
    if grad_usage is not None:
        slope += tl.load(grad_usage + tl.program_id(1) * words + tl.minimum(word, words - 1))[None, :]
    if grad_purity is not None:
        slope += 2 * tl.load(grad_purity + number)[:, None] * p
    return slope


@triton.jit(do_not_specialize=("n",))
def soft_assign_kernel(
    x, keys, bias, logits, codebook, soft, lse, codes, purity, n, books, words,
    KEY_WIDTH: tl.constexpr, WORD_WIDTH: tl.constexpr, SLICE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """codes, and of soft, lse and purity what is wanted; lse with the other two."""
    row, exists = owned_rows(n, BLOCK_M)
    book = tl.program_id(1)
    number = row.to(tl.int64) * books + book
    dtype: tl.constexpr = codebook.dtype.element_ty
    part = load_rows(x, number, KEY_WIDTH, SLICE)
    high = tl.full((BLOCK_M,), -INF, dtype)
    place = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M,), dtype)
    squares = tl.zeros((BLOCK_M,), dtype)
    values = tl.zeros((BLOCK_M, SLICE), dtype)
    for low in range(0, words, BLOCK_N):
        word = low + tl.arange(0, BLOCK_N)
        word_number = book.to(tl.int64) * words + tl.minimum(word, words - 1)
        key = load_rows(keys, word_number, KEY_WIDTH, SLICE)
        u = word_scores(part, key, bias, logits, number, word, words, dtype)
        top = tl.max(u, 1)
        first = tl.min(tl.where(u == top[:, None], word[None, :], words - 1), 1)
        better = top > high  # equals stay with the earlier word
        place = tl.where(better, first, place)
        highest = tl.where(better, top, high)
        if lse is not None:
            safe = tl.where(highest == -INF, 0.0, highest)
            e = exponential(u - safe[:, None])
            shrink = exponential(high - safe)
            total = total * shrink + tl.sum(e, 1)
            if purity is not None:
                squares = squares * shrink * shrink + tl.sum(e * e, 1)
            if soft is not None:
                code = load_rows(codebook, word_number, WORD_WIDTH, SLICE)
                like: tl.constexpr = soft.dtype.element_ty
                values = add_weighted(values * shrink[:, None], e, code, like, "ieee")
        high = highest
    tl.store(codes + number, place.to(tl.int64), mask=exists)
    if lse is not None:
        tl.store(lse + number, high + tl.log2(total) * LN2, mask=exists)
        if purity is not None:
            tl.store(purity + number, squares / (total * total), mask=exists)
        if soft is not None:
            store_rows(soft, number, values / total[:, None], exists, WORD_WIDTH)


@triton.jit(do_not_specialize=("n",))
def soft_assign_row_gradient_kernel(
    x, keys, bias, logits, codebook, grad_soft, grad_hard, grad_usage, grad_purity, lse, mean_slope, d_rows,
    n, books, words, STRAIGHT: tl.constexpr, KEY_WIDTH: tl.constexpr, WORD_WIDTH: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_rows: dx, or du where scores are given; and mean_slope (n, books): r."""
    row, exists = owned_rows(n, BLOCK_M)
    book = tl.program_id(1)
    number = row.to(tl.int64) * books + book
    dtype: tl.constexpr = codebook.dtype.element_ty
    part = load_rows(x, number, KEY_WIDTH, SLICE)
    SMOOTH: tl.constexpr = grad_soft is not None or STRAIGHT
    g = upstream_rows(grad_soft, grad_hard, number, STRAIGHT, WORD_WIDTH, SLICE)
    log_sum = tl.load(lse + number)[:, None]
    mean = tl.zeros((BLOCK_M,), dtype)
    all_words = tl.zeros((BLOCK_M,), dtype)
    total = tl.zeros((BLOCK_M, SLICE), dtype)
    for sweep in tl.static_range(2):
        if sweep == 1:
            mean = mean / all_words
        for low in range(0, words, BLOCK_N):
            word = low + tl.arange(0, BLOCK_N)
            word_number = book.to(tl.int64) * words + tl.minimum(word, words - 1)
            key = load_rows(keys, word_number, KEY_WIDTH, SLICE)
            code = load_rows(codebook, word_number, WORD_WIDTH, SLICE)
            p = exponential(word_scores(part, key, bias, logits, number, word, words, dtype) - log_sum)
            slope = upstream_slopes(p, g, code, grad_usage, grad_purity, number, word, words, SMOOTH)
            if sweep == 0:
                mean += tl.sum(p * slope, 1)
                all_words += tl.sum(p, 1)
            else:
                du = p * (slope - mean[:, None])
                if logits is None:
                    like: tl.constexpr = x.dtype.element_ty
                    total = add_weighted(total, du, key, like, "ieee")
                else:
                    target = d_rows + number[:, None] * words + word[None, :]
                    wanted = exists[:, None] & (word < words)[None, :]
                    tl.store(target, du.to(d_rows.dtype.element_ty), mask=wanted)
    tl.store(mean_slope + number, mean, mask=exists)
    if logits is None:
        store_rows(d_rows, number, total, exists, KEY_WIDTH)


@triton.jit(do_not_specialize=("n",))
def soft_assign_word_sums_kernel(
    x, keys, bias, logits, codebook, grad_soft, grad_hard, grad_usage, grad_purity, lse, codes, mean_slope,
    usage, dkeys, dbias, dcodebook, n, books, words,
    STRAIGHT: tl.constexpr, KEY_WIDTH: tl.constexpr, WORD_WIDTH: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """usage, dkeys, dbias and dcodebook (parts, books, words, ...), each where it is wanted, to be summed over the
    parts: grid axis 2 divides the rows. dbias with dkeys alone. lse is None where no p is needed."""
    word = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = word < words
    book = tl.program_id(1)
    word_number = book.to(tl.int64) * words + tl.minimum(word, words - 1)
    dtype: tl.constexpr = codebook.dtype.element_ty
    key = load_rows(keys, word_number, KEY_WIDTH, SLICE)
    code = load_rows(codebook, word_number, WORD_WIDTH, SLICE)
    used = tl.zeros((BLOCK_N,), dtype)
    of_bias = tl.zeros((BLOCK_N,), dtype)
    of_keys = tl.zeros((BLOCK_N, SLICE), dtype)
    of_codebook = tl.zeros((BLOCK_N, SLICE), dtype)
    SMOOTH: tl.constexpr = grad_soft is not None or STRAIGHT
    begin, end = owned_columns(n, 2, BLOCK_M)
    for low in range(begin, end, BLOCK_M):
        row = low + tl.arange(0, BLOCK_M)
        valid = (row < n)[:, None]
        number = tl.minimum(row, n - 1).to(tl.int64) * books + book
        if lse is not None:
            part = load_rows(x, number, KEY_WIDTH, SLICE)
            u = word_scores(part, key, bias, logits, number, word, words, dtype)
            p = tl.where(valid, exponential(u - tl.load(lse + number)[:, None]), 0.0)
            if usage is not None:
                used += tl.sum(p, 0)
            if dcodebook is not None and grad_soft is not None:
                of_soft = load_rows(grad_soft, number, WORD_WIDTH, SLICE)
                of_codebook = add_weighted(of_codebook, tl.trans(p), of_soft, of_soft.dtype, "ieee")
            if dkeys is not None:
                g = upstream_rows(grad_soft, grad_hard, number, STRAIGHT, WORD_WIDTH, SLICE)
                slope = upstream_slopes(p, g, code, grad_usage, grad_purity, number, word, words, SMOOTH)
                du = p * (slope - tl.load(mean_slope + number)[:, None])
                of_keys = add_exactly_weighted(of_keys, tl.trans(du), part)
                if dbias is not None:
                    of_bias += tl.sum(du, 0)
        if dcodebook is not None and grad_hard is not None:
            taken = valid & (tl.load(codes + number)[:, None] == word[None, :])
            h = load_rows(grad_hard, number, WORD_WIDTH, SLICE)
            of_codebook = add_weighted(of_codebook, tl.trans(taken.to(dtype)), h, h.dtype, "ieee")
    target = (tl.program_id(2) * tl.num_programs(1)).to(tl.int64) * words + word_number
    if usage is not None:
        tl.store(usage + target, used, mask=exists)
    if dkeys is not None:
        store_rows(dkeys, target, of_keys, exists, KEY_WIDTH)
        if dbias is not None:
            tl.store(dbias + target, of_bias, mask=exists)
    if dcodebook is not None:
        store_rows(dcodebook, target, of_codebook, exists, WORD_WIDTH)
