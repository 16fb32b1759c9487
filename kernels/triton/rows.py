"""Rows on their way into and out of the other kernels.

pack: u = x[order] / norm, norm = max(||x||, 1e-12), in the dtype of x, its width padded with zeros; whether all of x is
finite comes with it. unpack: the gradient of x from that of u,

    dx = (I - u u^T) du / norm,      du / norm where the norm is 1e-12 at the most

in the dtype asked for, back to the places that x had. A program owns some rows and reads them once; where they are
wider than its tile once for each pass, of which pack has 3 and unpack 2.

Squares are taken of numbers times a power of two, by the largest of the row, so that none overflows and not all vanish:
exact, and 1 for the usual ones.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NORM_EPS = tl.constexpr(1e-12)

# Numbers that differ from batch to batch must not make new variants of a kernel.
VARYING = ("n", "pieces")


@triton.jit
def row_tile(x, source, exists, begin, stride, step, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) features from ``begin`` on of rows ``source``, elements stride and step apart; 0 beyond WIDTH."""
    feature = begin + tl.arange(0, BLOCK_D)[None, :]
    place = x + source.to(tl.int64)[:, None] * stride + feature.to(tl.int64) * step
    return tl.load(place, mask=exists[:, None] & (feature < WIDTH), other=0.0).to(dtype)


@triton.jit
def largest_of(tile):
    """(R,) the largest magnitude of a row; infinity where there is NaN."""
    magnitude = tl.abs(tile)
    return tl.max(tl.where(magnitude < INF, magnitude, INF), 1)


@triton.jit
def safe_factor(largest):
    """A power of two: times it, squares of numbers up to ``largest`` are finite and that of the largest is normal."""
    if largest.dtype == tl.float64:
        bound, factor = tl.full(largest.shape, 2.0**400, tl.float64), tl.full(largest.shape, 2.0**600, tl.float64)
    else:
        bound, factor = tl.full(largest.shape, 2.0**50, tl.float32), tl.full(largest.shape, 2.0**80, tl.float32)
    return tl.where(largest > bound, 1 / factor, tl.where(largest < 1 / bound, factor, 1.0))


@triton.jit
def greatest(like):
    """The largest finite number of a dtype, of the shape of ``like``."""
    if like.dtype == tl.float64:
        return tl.full(like.shape, 1.7976931348623157e308, tl.float64)
    else:
        return tl.full(like.shape, 3.4028234663852886e38, tl.float32)


@triton.jit(do_not_specialize=VARYING)
def pack_kernel(
    x, order, rows, norms, nothing, n, stride, step,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows (n, PADDED) and norms (n,) of x[order], each where it is not None; rows are as they are where there are no
    norms. ``nothing``, 0-dim, where there is one, becomes NaN if x holds NaN or infinity, whose rows have norms of NaN:
    programs that write to it write the same.
    """
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    own = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = own < n
    source = own
    if order is not None:
        source = tl.load(order + own, mask=exists, other=0)
    first = row_tile(x, source, exists, 0, stride, step, dtype, WIDTH, BLOCK_D)
    largest = largest_of(first)
    for begin in range(BLOCK_D, WIDTH, BLOCK_D):
        tile = row_tile(x, source, exists, begin, stride, step, dtype, WIDTH, BLOCK_D)
        largest = tl.maximum(largest, largest_of(tile))
    bad = largest == INF
    if nothing is not None:
        tl.store(nothing, float("nan"), mask=tl.max(bad.to(tl.int32), 0) > 0)
    factor = tl.full((BLOCK_R,), 1.0, dtype)
    norm = tl.full((BLOCK_R,), 1.0, dtype)
    if norms is not None:
        factor = safe_factor(largest)
        squares = tl.sum(first * factor[:, None] * (first * factor[:, None]), 1)
        for begin in range(BLOCK_D, WIDTH, BLOCK_D):
            tile = row_tile(x, source, exists, begin, stride, step, dtype, WIDTH, BLOCK_D) * factor[:, None]
            squares += tl.sum(tile * tile, 1)
        norm = tl.maximum(tl.sqrt(squares), tl.full((BLOCK_R,), NORM_EPS, dtype) * factor)
        norm = tl.where(bad, float("nan"), norm)
        length = norm / factor  # may leave the range of finite numbers, though the rows do not
        tl.store(norms + own, tl.where(length == INF, greatest(length), length), mask=exists)
    if rows is not None:
        target = rows + own.to(tl.int64)[:, None] * PADDED
        feature = tl.arange(0, BLOCK_D)[None, :]
        inside = exists[:, None] & (feature < PADDED)
        if norms is not None:
            first = first * factor[:, None] / norm[:, None]
        tl.store(target + feature, first.to(rows.dtype.element_ty), mask=inside)
        for begin in range(BLOCK_D, PADDED, BLOCK_D):
            tile = row_tile(x, source, exists, begin, stride, step, dtype, WIDTH, BLOCK_D)
            if norms is not None:
                tile = tile * factor[:, None] / norm[:, None]
            inside = exists[:, None] & (begin + feature < PADDED)
            tl.store(target + begin + feature, tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def gradient_tile(du, own, exists, begin, n, pieces, du_stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) features of du (pieces, n, ...), summed over the pieces in their order."""
    dtype: tl.constexpr = du.dtype.element_ty
    total = row_tile(du, own, exists, begin, du_stride, 1, dtype, WIDTH, BLOCK_D)
    for piece in range(1, pieces):
        place = own + piece * n.to(tl.int64)
        total += row_tile(du, place, exists, begin, du_stride, 1, dtype, WIDTH, BLOCK_D)
    return total


@triton.jit
def store_gradient(
    dx, tile, u, radial, norm, nothing, place, exists, begin, dx_stride,
    ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(tile - radial u) / norm, without a radial part where u is None, to the rows ``place`` of dx, or onto them."""
    if u is not None:
        tile = (tile - radial[:, None] * u) / norm[:, None]
    if nothing is not None:
        tile += tl.load(nothing)
    feature = begin + tl.arange(0, BLOCK_D)[None, :]
    target = dx + place.to(tl.int64)[:, None] * dx_stride + feature
    inside = exists[:, None] & (feature < WIDTH)
    if ADD:
        tile += tl.load(target, mask=inside, other=0.0).to(tile.dtype)
    tl.store(target, tile.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def unpack_kernel(
    du, rows, norms, order, nothing, dx, n, pieces, du_stride, stride, dx_stride,
    RAW: tl.constexpr, ADD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx[order] = the gradient from du (pieces, n, ...), with ``nothing`` added; ADD: added to what is there.

    Rows of du are du_stride apart, those of dx dx_stride; where order is None dx may be du, of one part. norms None: du
    itself. RAW: ``rows``, stride apart, are those of x, not divided by their norms, and du is what it is for u, divided
    by them.
    """
    dtype: tl.constexpr = du.dtype.element_ty
    own = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = own < n
    place = own
    if order is not None:
        place = tl.load(order + own, mask=exists, other=0)
    first = gradient_tile(du, own, exists, 0, n, pieces, du_stride, WIDTH, BLOCK_D)
    if norms is None:
        store_gradient(dx, first, None, None, None, nothing, place, exists, 0, dx_stride, ADD, WIDTH, BLOCK_D)
        for begin in range(BLOCK_D, WIDTH, BLOCK_D):
            tile = gradient_tile(du, own, exists, begin, n, pieces, du_stride, WIDTH, BLOCK_D)
            store_gradient(dx, tile, None, None, None, nothing, place, exists, begin, dx_stride, ADD, WIDTH, BLOCK_D)
    else:
        norm = tl.load(norms + own, mask=exists, other=1.0)
        short = norm <= tl.full((BLOCK_R,), NORM_EPS, dtype)
        over = tl.full((BLOCK_R,), 1.0, dtype)
        if RAW:
            over = norm
            norm = tl.full((BLOCK_R,), 1.0, dtype)
        unit = row_tile(rows, own, exists, 0, stride, 1, dtype, WIDTH, BLOCK_D) / over[:, None]
        radial = tl.sum(first * unit, 1)
        for begin in range(BLOCK_D, WIDTH, BLOCK_D):
            tile = gradient_tile(du, own, exists, begin, n, pieces, du_stride, WIDTH, BLOCK_D)
            u = row_tile(rows, own, exists, begin, stride, 1, dtype, WIDTH, BLOCK_D) / over[:, None]
            radial += tl.sum(tile * u, 1)
        radial = tl.where(short, 0.0, radial)
        store_gradient(dx, first, unit, radial, norm, nothing, place, exists, 0, dx_stride, ADD, WIDTH, BLOCK_D)
        for begin in range(BLOCK_D, WIDTH, BLOCK_D):
            tile = gradient_tile(du, own, exists, begin, n, pieces, du_stride, WIDTH, BLOCK_D)
            u = row_tile(rows, own, exists, begin, stride, 1, dtype, WIDTH, BLOCK_D) / over[:, None]
            store_gradient(dx, tile, u, radial, norm, nothing, place, exists, begin, dx_stride, ADD, WIDTH, BLOCK_D)
