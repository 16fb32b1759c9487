"""Functions phi(z) of a logit that a head sums over its pairs, and their slopes; what they are where rounding carries
an argument past its end is defined in fastret/backends/phi.py.

Made of exp2, log2, sqrt and arithmetic: Triton has no log1p and no expm1 of its own, and its interpreter none of
libdevice. Series have the terms that the dtype needs.
"""

import triton
import triton.language as tl

from fastret.kernels.triton.pairwise import LN2, exponential


@triton.jit
def gap_below_zero(z, ULPS: tl.constexpr):
    """-z, at least ULPS units in the last place of 1; and whether that is nearer to 0. NaN stays NaN."""
    floor: tl.constexpr = ULPS * (2.0**-52 if z.dtype == tl.float64 else 2.0**-23)
    near = -z < floor
    return tl.where(near, floor, -z), near


@triton.jit
def decay(gap):
    """e^-gap, and 1 - e^-gap without cancellation, for gap > 0."""
    TERMS: tl.constexpr = 18 if gap.dtype == tl.float64 else 11
    e = exponential(-gap)
    small = tl.minimum(gap, 0.7)
    series = tl.full(gap.shape, 1.0, gap.dtype)  # gap - gap^2 / 2 + gap^3 / 6 - ..., over gap
    for k in tl.static_range(TERMS - 1):
        series = 1.0 - small * series * (1.0 / (TERMS - k))
    return e, tl.where(gap < 0.7, small * series, 1.0 - e)


@triton.jit
def log1m_exp(z):
    """log(1 - e^z)."""
    TERMS: tl.constexpr = 17 if z.dtype == tl.float64 else 8
    gap, _ = gap_below_zero(z, 1)
    e, rest = decay(gap)
    # log((1 - s) / (1 + s)) = -2 (s + s^3 / 3 + s^5 / 5 + ...), which keeps the digits of a small e
    s = e / (2.0 - e)
    square = s * s
    series = tl.full(z.shape, 1.0 / (2 * TERMS - 1), z.dtype)
    for k in tl.static_range(TERMS - 1):
        series = series * square + 1.0 / (2 * (TERMS - k) - 3)
    return tl.where(gap < 0.7, tl.log2(rest) * LN2, -2.0 * s * series)


@triton.jit
def phi_value(NAME: tl.constexpr, z):
    """phi(z), elementwise."""
    if NAME == "hinge":
        return tl.where(z < 0.0, 0.0, z)
    elif NAME == "log1m_exp":
        return log1m_exp(z)
    else:
        gap, near = gap_below_zero(z, 32)
        root = tl.sqrt(gap)
        if NAME == "distance":
            return tl.where(near, 0.0, root)
        else:
            return 1.0 / root


@triton.jit
def phi_slope(NAME: tl.constexpr, z):
    """d phi / dz, elementwise."""
    if NAME == "hinge":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        gap, near = gap_below_zero(z, 1 if NAME == "log1m_exp" else 32)
        if NAME == "log1m_exp":
            e, rest = decay(gap)
            return -e / rest
        elif NAME == "distance":
            return tl.where(near, 0.0, -0.5 / tl.sqrt(gap))
        else:
            return tl.where(near, 0.0, 0.5 / (gap * tl.sqrt(gap)))
