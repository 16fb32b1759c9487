"""update_rows_: rows of a bank moved towards new ones, in place.

    M_y <- mu M_y + (1 - mu) x, or the other way about; over its norm where asked

The index comes sorted, with the places in the batch that it had; programs are as many, and of those of one index the
first, or the last, works: one writer a row. 2 D numbers read (three times, of which two from a cache) and D written.
"""

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def moved(row, x, order, begin, end, kept, taken, feature, MEAN: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """The new row at ``feature`` (F,), 0 beyond the width; towards x[order[begin]] or the mean up to order[end - 1],
    which is summed in float64 in the order of the batch."""
    inside = feature < WIDTH
    old = tl.load(row + feature * STEP, mask=inside, other=0.0).to(kept.dtype)
    if MEAN:
        total = tl.zeros_like(feature).to(tl.float64)
        for k in range(begin, end):
            place = tl.load(order + k)
            total += tl.load(x + place * WIDTH + feature, mask=inside, other=0.0).to(kept.dtype).to(tl.float64)
        new = (total / (end - begin)).to(kept.dtype)
    else:
        new = tl.load(x + tl.load(order + begin) * WIDTH + feature, mask=inside, other=0.0).to(kept.dtype)
    return kept * old + taken * new


@triton.jit(do_not_specialize=("n",))
def update_rows_kernel(
    bank, ordered, order, x, momentum, n, KEEPS: tl.constexpr, NORMALIZE: tl.constexpr, DUPLICATES: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Elements of the bank stand STRIDE and STEP apart. momentum: 0-dim, in the dtype of accumulation, the weight of
    the old row where it KEEPS."""
    begin = tl.program_id(0)
    own = tl.load(ordered + begin)
    neighbour = begin + 1 if DUPLICATES == "last" else begin - 1
    if tl.load(ordered + neighbour, mask=(neighbour >= 0) & (neighbour < n), other=-1) != own:
        MEAN: tl.constexpr = DUPLICATES == "mean"
        end = begin + 1
        if MEAN:
            while tl.load(ordered + end, mask=end < n, other=-1) == own:
                end += 1
        kept = tl.load(momentum)
        taken = 1 - kept
        if not KEEPS:
            kept, taken = taken, kept
        row = bank + own * STRIDE
        norm = tl.full((), 1.0, kept.dtype)
        if NORMALIZE:
            largest = tl.zeros_like(norm)
            for low in range(0, WIDTH, BLOCK_D):
                tile = moved(row, x, order, begin, end, kept, taken, low + tl.arange(0, BLOCK_D), MEAN, WIDTH, STEP)
                largest = tl.maximum(largest, tl.max(tl.abs(tile)))
            safe = tl.where(largest > 0, largest, 1.0)  # squares of numbers up to 1: none overflows, not all vanish
            squares = tl.zeros_like(norm)
            for low in range(0, WIDTH, BLOCK_D):
                tile = moved(row, x, order, begin, end, kept, taken, low + tl.arange(0, BLOCK_D), MEAN, WIDTH, STEP)
                squares += tl.sum((tile / safe) * (tile / safe))
            norm = tl.sqrt(squares) * largest
            norm = tl.where(norm < NORM_EPS, NORM_EPS, norm)  # NaN stays
        for low in range(0, WIDTH, BLOCK_D):
            feature = low + tl.arange(0, BLOCK_D)
            tile = moved(row, x, order, begin, end, kept, taken, feature, MEAN, WIDTH, STEP) / norm
            tl.store(row + feature * STEP, tile.to(bank.dtype.element_ty), mask=feature < WIDTH)
