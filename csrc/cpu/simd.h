// Vectors of the width of the instruction set, in GCC vector extensions (GCC and Clang, x86 and Arm).
#pragma once
#include <cstdint>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

FASTRET_ISA_BEGIN

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FASTRET_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(FASTRET_VECTOR_BYTES)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FASTRET_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(FASTRET_VECTOR_BYTES)));
};
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> using Bits = typename VectorOf<T>::bits;
template <class T> constexpr int lanes = FASTRET_VECTOR_BYTES / sizeof(T);

template <class T> constexpr T kNothing = -std::numeric_limits<T>::infinity();

template <class T> inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T> inline void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T> inline Vec<T> splat(T s) { return Vec<T>{} + s; }

// v as it is, rounded: not to be contracted with what follows.
template <class V> inline V rounded(V v) {
#if defined(__x86_64__) && defined(__FMA__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  static_assert(sizeof(V) <= 16, "one register");
  __asm__("" : "+w"(v));
#endif
  return v;
}

// The first n < lanes<T> elements; the other lanes hold `fill`.
template <class T> inline Vec<T> load_tail(const T* p, int64_t n, T fill) {
  Vec<T> v = splat(fill);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T> inline void store_tail(T* p, Vec<T> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

template <class T> inline T sum(Vec<T> v) {
  T s = v[0];
  for (int i = 1; i < lanes<T>; ++i) s += v[i];
  return s;
}

// Bit i: lane i of a is greater than that of b; not set where either is NaN. Vector extensions have no such reduction.
// Vectors of any width up to that of the instruction set.
template <class V> inline uint32_t lanes_above(V a, V b) {
  using T = std::decay_t<decltype(a[0])>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
    else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    if constexpr (sizeof(T) == 4) return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
    else return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) {
    if constexpr (sizeof(T) == 4) return uint32_t(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
    else return uint32_t(_mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)));
  }
#else
  uint32_t bits = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
#endif
}

// 2^x for x among the exponents of normal numbers; of others any number. Relative error 5e-9 (float, before rounding),
// 1e-19 (double): (2^f - 1)/f interpolated at Chebyshev nodes of |f| <= 1/2, so that 2^0 is exactly 1. NaN stays NaN:
// the exponent is multiplied in, because adding it to the bits would turn a NaN into a number.
inline Vec<float> exp2_normal(Vec<float> x) {
  const Vec<float> magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23 + bias: its low bits become the exponent
  const Vec<float> z = x + magic;
  const Vec<float> f = x - (z - magic);
  const Vec<float> scale = (Vec<float>)((Bits<float>)z << 23);
  Vec<float> q = splat(1.5453162945120690e-4f);
  q = q * f + 1.3390863364671234e-3f;
  q = q * f + 9.6180825572778515e-3f;
  q = q * f + 5.5503571142190778e-2f;
  q = q * f + 2.4022650760568127e-1f;
  q = q * f + 6.9314718802622878e-1f;
  return (q * f + 1.0f) * scale;
}
inline Vec<double> exp2_normal(Vec<double> x) {
  const Vec<double> magic = splat(6755399441055744.0 + 1023.0);
  const Vec<double> z = x + magic;
  const Vec<double> f = x - (z - magic);
  const Vec<double> scale = (Vec<double>)((Bits<double>)z << 52);
  Vec<double> q = splat(2.5729324177362304e-11);
  q = q * f + 4.4558179083360645e-10;
  q = q * f + 7.0548973041554993e-9;
  q = q * f + 1.0178057087733941e-7;
  q = q * f + 1.3215486808705563e-6;
  q = q * f + 1.5252733841556773e-5;
  q = q * f + 1.5403530393370733e-4;
  q = q * f + 1.3333558146406471e-3;
  q = q * f + 9.6181291076284795e-3;
  q = q * f + 5.5504108664821627e-2;
  q = q * f + 2.4022650695910071e-1;
  q = q * f + 6.9314718055994531e-1;
  return (q * f + 1.0) * scale;
}

// 2^x for x clamped to the exponents of normal numbers.
inline Vec<float> exp2(Vec<float> x) {
  const Vec<float> limit = splat(126.0f);
  x = x < -limit ? -limit : x;
  return exp2_normal(x > limit ? limit : x);
}
inline Vec<double> exp2(Vec<double> x) {
  const Vec<double> limit = splat(1022.0);
  x = x < -limit ? -limit : x;
  return exp2_normal(x > limit ? limit : x);
}

// One lanes x lanes block, transposed in log2(lanes) perfect shuffles. add: onto what `to` holds.
template <class T, bool add> inline void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int V = lanes<T>;
  Vec<T> a[V], b[V];
  Bits<T> low, high;
  for (int i = 0; i < V; ++i) {
    a[i] = load<T>(from + i * from_stride);
    low[i] = i % 2 * V + i / 2;
    high[i] = i % 2 * V + V / 2 + i / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < V; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < V / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + V / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + V / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) a[i] = b[i];
  }
  for (int i = 0; i < V; ++i) store<T>(to + i * to_stride, add ? a[i] + load<T>(to + i * to_stride) : a[i]);
}

// to (cols x rows) = or += from^T (rows x cols)
template <bool add, class T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t cols, T* to, int64_t to_stride) {
  constexpr int64_t V = lanes<T>;
  for (int64_t i = 0; i < rows; i += V)
    for (int64_t j = 0; j < cols; j += V) {
      if (i + V <= rows && j + V <= cols) {
        transpose_block<T, add>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
        continue;
      }
      for (int64_t r = i; r < rows && r < i + V; ++r)
        for (int64_t c = j; c < cols && c < j + V; ++c) {
          T& out = to[c * to_stride + r];
          out = add ? out + from[r * from_stride + c] : from[r * from_stride + c];
        }
    }
}

FASTRET_ISA_END
