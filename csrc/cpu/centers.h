// Sub-centres of masked_lse: a column of a tile is a class, and its K rows of y give K products that become one score
// before the epilogue, and take their parts of its slope after. The definition is fastret/backends/centers.py.
//
// Products of the k-th centres of all classes of a tile are plane k, of the tile's own layout: K multiplications with
// every K-th row of y, after which classes are lanes of vectors, whatever K is.
#pragma once
#include <cmath>

#include "gemm.h"
#include "masked_lse.h"
#include "pair_rows.h"

FASTRET_ISA_BEGIN

// Products of a tile's rows and columns: planes `plane` elements apart, rows of a plane `stride`.
template <class T> struct CenterTile {
  T* products;
  int64_t rows, cols, stride, plane;
};

// y: the first centre of the tile's first class; rows of d features.
template <class T>
void multiply_centers(const Centers& centers, const CenterTile<T>& t, int64_t d, const T* x, const T* y, T* workspace) {
  for (int64_t k = 0; k < centers.count; ++k) {
    T* plane = t.products + k * t.plane;
    gemm(Op::none, Op::transpose, t.rows, t.cols, d, x, d, y + k * d, centers.count * d, false, plane, t.stride,
         workspace);
    for (int64_t r = 0; r < t.rows; ++r)
      std::fill(plane + r * t.stride + t.cols, plane + r * t.stride + padded<T>(t.cols), T(0));
  }
}

// Scores of classes, padded as products are; where `slopes`, products become d score / d product. One function for
// both, so that scores are the same bits in every pass.
template <class T>
__attribute__((noinline)) void reduce_centers(const Centers& centers, const CenterTile<T>& t, T* scores, bool slopes) {
  const int64_t count = centers.count, plane = t.plane;
  const bool greatest = centers.temperature == 0;
  const T inverse = greatest ? T(0) : T(1 / centers.temperature), gamma = T(centers.temperature);
  const Vec<T> least = splat(T(-1000));  // e to this is 0, and times this still 0
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t j = 0; j < t.cols; j += lanes<T>) {
      T* s = t.products + r * t.stride + j;
      Vec<T> top = load<T>(s), winner{};
      for (int64_t k = 1; k < count; ++k) {
        const Vec<T> v = load<T>(s + k * plane);
        const auto better = v > top;
        top = better ? v : top;
        winner = better ? splat(T(k)) : winner;
      }
      if (greatest) {
        store<T>(scores + r * t.stride + j, top);
        for (int64_t k = 0; slopes && k < count; ++k)
          store<T>(s + k * plane, winner == splat(T(k)) ? splat(T(1)) : Vec<T>{});
        continue;
      }
      const auto exponent = [&](int64_t k) {
        const Vec<T> z = (load<T>(s + k * plane) - top) * inverse;
        return z < least ? least : z;
      };
      Vec<T> total{}, mean{};  // of e^z and of z under it
      for (int64_t k = 0; k < count; ++k) {
        const Vec<T> z = exponent(k), e = exp_or_zero<T>(z);
        total += e;
        mean += e * z;
      }
      mean /= total;
      store<T>(scores + r * t.stride + j, top + mean * gamma);
      for (int64_t k = 0; slopes && k < count; ++k) {
        const Vec<T> z = exponent(k);
        store<T>(s + k * plane, exp_or_zero<T>(z) / total * (z - mean + T(1)));
      }
    }
}

// From dL / d score and d score / d product: onto dx of the tile's rows, and onto dy of its classes' centres, or, where
// not `add`, in its place. Null where not wanted.
template <class T>
void differentiate_centers(const Centers& centers, const CenterTile<T>& t, const T* slopes, int64_t d, const T* x,
                           const T* y, T* dx, T* dy, bool add, T* workspace) {
  const int64_t step = centers.count * d;
  for (int64_t k = 0; k < centers.count; ++k) {
    T* plane = t.products + k * t.plane;
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t j = r * t.stride; j < r * t.stride + t.cols; j += lanes<T>)
        store<T>(plane + j, load<T>(plane + j) * load<T>(slopes + j));
    if (dx) gemm(Op::none, Op::none, t.rows, d, t.cols, plane, t.stride, y + k * d, step, true, dx, d, workspace);
    if (dy) gemm(Op::transpose, Op::none, t.cols, d, t.rows, plane, t.stride, x, d, add, dy + k * d, step, workspace);
  }
}

FASTRET_ISA_END
