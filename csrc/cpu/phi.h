// Functions phi(z) of a logit that a head sums over its pairs, and their slopes, over a row in place. What they are
// where rounding carries an argument past its end is defined in fastret/backends/phi.py.
#pragma once
#include <cmath>
#include <limits>

#include "masked_lse.h"
#include "pair_rows.h"
#include "simd.h"

FASTRET_ISA_BEGIN

// Constants of e^x and log x. exponential: (e^r - 1 - r) / r^2 for |r| <= log(2) / 2; logarithm: q in
// log((1 + s) / (1 - s)) = 2 s + s^3 q(s^2) for |s| <= 3 - 2 sqrt(2), both interpolated at Chebyshev nodes, highest
// power first: relative errors 5e-10 and 3e-9 (float), 6e-19 and 4e-18 (double). log 2 = high + low, of which high has
// zeros at its end, so that multiples of it are exact.
template <class T> struct Series;
template <> struct Series<float> {
  static constexpr int mantissa = 23;
  static constexpr float magic = 12582912.0f + 127.0f;  // see exp2
  static constexpr float least = -87.3f;                // e^x is a normal number from here on
  static constexpr float high = 0.693359375f, low = -2.1219444005469058e-4f;
  static constexpr int32_t root_half = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float exponential[] = {1.9891080463998842e-4f, 1.3933730715792083e-3f, 8.3333108446478626e-3f,
                                          4.1666464197405692e-2f, 1.6666666681704215e-1f, 5.0000000135387299e-1f};
  static constexpr float logarithm[] = {2.958202252541237e-1f, 3.9988734843129681e-1f, 6.6666685151396745e-1f};
};
template <> struct Series<double> {
  static constexpr int mantissa = 52;
  static constexpr double magic = 6755399441055744.0 + 1023.0;
  static constexpr double least = -708.3;
  static constexpr double high = 0.6931467056274414, low = 4.7493250390316723e-7;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr double exponential[] = {
      2.0914755325893202e-9, 2.5105312729622102e-8, 2.755727347871858e-7,  2.7557255170000887e-6,
      2.4801587325677462e-5, 1.9841269875002279e-4, 1.3888888888883711e-3, 8.3333333333260831e-3,
      4.166666666666667e-2,  1.6666666666666671e-1, 5.0e-1};
  static constexpr double logarithm[] = {1.461916477718642e-1,  1.5331501721207419e-1, 1.8182895746801429e-1,
                                         2.2222211043822486e-1, 2.8571428626533336e-1, 3.9999999999898273e-1,
                                         6.6666666666666697e-1};
};

template <class T, int N> inline Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
  Vec<T> result = splat(c[0]);
#pragma GCC unroll 16
  for (int k = 1; k < N; ++k) result = result * x + c[k];
  return result;
}

// log w of positive normal numbers, to an ulp of itself also beside 1. NaN stays NaN.
template <class T> inline Vec<T> log(Vec<T> w) {
  using S = Series<T>;
  const Bits<T> bits = (Bits<T>)w, exponent = (bits - S::root_half) >> S::mantissa;
  const Vec<T> k = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> f = (Vec<T>)(bits - (exponent << S::mantissa)) - T(1);  // w = 2^k (1 + f), 1 + f about 1
  const Vec<T> s = f / (f + T(2)), z = s * s, half = f * f * T(0.5);
  const Vec<T> rest = s * (half + z * polynomial(S::logarithm, z)) + k * S::low;
  return w == w ? k * S::high - ((half - rest) - f) : w;
}

// e^-gap, and 1 - e^-gap without cancellation.
template <class T> struct Decay {
  Vec<T> e, rest;
};
template <class T> inline Decay<T> decay(Vec<T> gap) {
  using S = Series<T>;
  const Vec<T> least = splat(S::least), x = -gap, near = x < least ? least : x;
  const Vec<T> shifted = near * T(kLog2e) + S::magic, k = shifted - S::magic;
  const Vec<T> r = (near - k * S::high) - k * S::low;
  const Vec<T> p = r + r * r * polynomial(S::exponential, r);  // e^r - 1
  const Vec<T> scale = (Vec<T>)((Bits<T>)shifted << S::mantissa);
  const Vec<T> e = scale + scale * p;
  return {x < least ? Vec<T>{} : e, (T(1) - scale) - scale * p};
}

// Squared distances below this are those of rows that coincide.
template <class T> constexpr T kCoincide = 32 * std::numeric_limits<T>::epsilon();

// How far z stays below 0, at least the resolution of the type.
template <class T> inline Vec<T> gap_below_zero(Vec<T> z) {
  const Vec<T> gap = -z, floor = splat(std::numeric_limits<T>::epsilon());
  return gap < floor ? floor : gap;
}

template <class T> inline Vec<T> log1m_exp(Vec<T> z) {
  const Vec<T> gap = gap_below_zero<T>(z);
  const auto [e, rest] = decay<T>(gap);
  // what 1 - e lost to rounding, exactly, where all of e may be lost; below, rest is right to its last bit
  const Vec<T> lost = gap < splat(T(0.7)) ? Vec<T>{} : (T(1) - rest) - e;
  return log<T>(rest) + lost / rest;
}
template <class T> inline Vec<T> log1m_exp_slope(Vec<T> z) {
  const auto [e, rest] = decay<T>(gap_below_zero<T>(z));
  return -e / rest;
}

// z becomes phi(z). Rows are padded to whole vectors.
template <class T> void phi_values(Reduction phi, int64_t cols, T* z) {
  constexpr T floor = kCoincide<T>;
  const int64_t width = padded<T>(cols);
  switch (phi) {
    case Reduction::log1m_exp:
      for (int64_t j = 0; j < width; j += lanes<T>) store<T>(z + j, log1m_exp<T>(load<T>(z + j)));
      break;
    case Reduction::hinge:
      for (int64_t j = 0; j < width; ++j) z[j] = z[j] < T(0) ? T(0) : z[j];
      break;
    case Reduction::distance:
      for (int64_t j = 0; j < width; ++j) {
        const T root = std::sqrt(-z[j] < floor ? T(0) : -z[j]);
        z[j] = root;
      }
      break;
    case Reduction::inverse_distance:
      for (int64_t j = 0; j < width; ++j) {
        const T root = std::sqrt(-z[j] < floor ? floor : -z[j]);
        z[j] = T(1) / root;
      }
      break;
    default: break;
  }
}

// z becomes the slope of phi at z.
template <class T> void phi_slopes(Reduction phi, int64_t cols, T* z) {
  constexpr T floor = kCoincide<T>;
  const int64_t width = padded<T>(cols);
  switch (phi) {
    case Reduction::log1m_exp:
      for (int64_t j = 0; j < width; j += lanes<T>) store<T>(z + j, log1m_exp_slope<T>(load<T>(z + j)));
      break;
    case Reduction::hinge:
      for (int64_t j = 0; j < width; ++j) z[j] = z[j] > T(0) ? T(1) : T(0);
      break;
    case Reduction::distance:
      for (int64_t j = 0; j < width; ++j) {
        const T gap = -z[j], slope = T(-0.5) / std::sqrt(gap < floor ? floor : gap);
        z[j] = gap < floor ? T(0) : slope;
      }
      break;
    case Reduction::inverse_distance:
      for (int64_t j = 0; j < width; ++j) {
        const T gap = -z[j], safe = gap < floor ? floor : gap, slope = T(0.5) / (safe * std::sqrt(safe));
        z[j] = gap < floor ? T(0) : slope;
      }
      break;
    default: break;
  }
}

FASTRET_ISA_END
