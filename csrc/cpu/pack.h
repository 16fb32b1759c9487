// Rows on their way into and out of a kernel: gathered in the kernel's order, converted, L2-normalised; and back.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/array.h"
#include "../common/half.h"
#include "simd.h"

FASTRET_ISA_BEGIN

constexpr double kNormEps = 1e-12;  // rows shorter than this are divided by it, as torch.nn.functional.normalize does

// Calls visit(pointer) with the array's rows as their own type.
template <class T, class Visit> void with_type(const Array& a, Visit visit) {
  if constexpr (sizeof(T) == 8) {
    visit(a.as<double>());
  } else {
    if (a.dtype == DType::bf16) visit(a.as<BFloat16>());
    else if (a.dtype == DType::f16) visit(a.as<Half>());
    else visit(a.as<float>());
  }
}

// Norm of a row that neither overflows nor underflows; NaN when any element is NaN or infinite. Products with 0 would
// not find it: where signs of 0 do not count, GCC takes them for 0.
template <class T> T norm_of(const T* row, int64_t d) {
  constexpr int64_t V = lanes<T>;
  Vec<T> squares{};
  int64_t k = 0;
  for (; k + V <= d; k += V) {
    const Vec<T> v = load<T>(row + k);
    squares += v * v;
  }
  T total = sum<T>(squares);
  for (; k < d; ++k) total += row[k] * row[k];
  constexpr T tiny = sizeof(T) == 4 ? T(1e-24) : T(1e-200), huge = sizeof(T) == 4 ? T(1e30) : T(1e300);
  if (total > tiny && total < huge) return std::sqrt(total);
  T largest = 0;
  for (k = 0; k < d; ++k) {
    const T size = std::abs(row[k]);
    if (!(size <= std::numeric_limits<T>::max())) return std::numeric_limits<T>::quiet_NaN();
    largest = std::max(largest, size);
  }
  if (largest == T(0)) return T(0);
  total = 0;
  for (k = 0; k < d; ++k) total += (row[k] / largest) * (row[k] / largest);
  return largest * std::sqrt(total);
}

template <class T> T dot(const T* a, const T* b, int64_t d) {
  constexpr int64_t V = lanes<T>;
  Vec<T> even{}, odd{};
  int64_t k = 0;
  for (; k + 2 * V <= d; k += 2 * V) {
    even += load<T>(a + k) * load<T>(b + k);
    odd += load<T>(a + k + V) * load<T>(b + k + V);
  }
  T total = sum<T>(even + odd);
  for (; k < d; ++k) total += a[k] * b[k];
  return total;
}

// out[p] = x[order[p]] (x[p] without an order) for p in [begin, end), divided by its norm when `normalize`; norms[p] is
// that divisor. Returns 0, or NaN when a row holds NaN or infinity: a bounded function of the scores would hide it.
template <class T>
T pack_rows(const Array& x, const int64_t* order, bool normalize, int64_t begin, int64_t end, T* out, T* norms) {
  const int64_t d = x.cols;
  T poison = 0;
  with_type<T>(x, [&](auto* data) {
    for (int64_t p = begin; p < end; ++p) {
      const auto* row = data + (order ? order[p] : p) * x.stride;
      T* to = out + p * d;
      for (int64_t k = 0; k < d; ++k) to[k] = widen(row[k]);
      const T norm = norm_of(to, d);
      if (norm != norm) poison = norm;
      if (!normalize) continue;
      norms[p] = norm < T(kNormEps) ? T(kNormEps) : norm;
      for (int64_t k = 0; k < d; ++k) to[k] /= norms[p];
    }
  });
  return poison;
}

// The same by all threads of a parallel region. Rows that may be used where they lie (`copy` false, out = x) are only
// looked at. Every thread returns the poison of its own rows.
template <class T>
T place_rows(const Array& x, bool copy, bool normalize, const int64_t* order, int64_t begin, int64_t end, T* out,
             T* norms) {
  constexpr int64_t kPiece = 32;
  T poison = 0;
#pragma omp for schedule(static)
  for (int64_t b = 0; b < (end - begin + kPiece - 1) / kPiece; ++b) {
    const int64_t first = begin + b * kPiece, last = std::min(end, first + kPiece);
    if (copy) {
      poison += pack_rows(x, order, normalize, first, last, out, norms);
      continue;
    }
    for (int64_t p = first; p < last; ++p)
      if (const T norm = norm_of(out + p * x.cols, x.cols); norm != norm) poison = norm;
  }
  return poison;
}
template <class T> T place_rows(const Array& x, bool copy, bool normalize, const int64_t* order, T* out, T* norms) {
  return place_rows(x, copy, normalize, order, 0, x.rows, out, norms);
}

// du (one row, gradient of the unit row u = x / norm) becomes the gradient of x, in place.
template <class T> void project_row(T* du, const T* u, T norm, int64_t d) {
  const T radial = norm > T(kNormEps) ? dot(du, u, d) : T(0);
  for (int64_t k = 0; k < d; ++k) du[k] = (du[k] - radial * u[k]) / norm;
}

FASTRET_ISA_END
