#include "blas.h"

#include <cmath>
#include <stdexcept>
#include <thread>

namespace fastret {

Blas& blas() {
  static Blas instance;
  return instance;
}

namespace {

// C (3x2) = A (3x4) B (4x2) against a loop, in the column-major calling convention with 32-bit integers. A symbol of
// that name with another convention (64-bit integers, say) must not be believed.
template <class T, class Gemm> bool right(Gemm gemm) {
  const int m = 3, n = 2, k = 4;
  T a[12], b[8], c[6];
  for (int i = 0; i < 12; ++i) a[i] = T(i + 1);
  for (int i = 0; i < 8; ++i) b[i] = T(2 - i);
  for (int i = 0; i < 6; ++i) c[i] = T(1);
  const T alpha = 1, beta = 2;
  gemm("N", "N", &m, &n, &k, &alpha, a, &m, b, &k, &beta, c, &m);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      T expected = 2;
      for (int p = 0; p < k; ++p) expected += a[i + p * m] * b[p + j * k];
      if (!(std::abs(c[i + j * m] - expected) < T(1e-4))) return false;
    }
  return true;
}

template <class T, class Gemm> bool right_from_two_threads(Gemm gemm) {
  bool first = false, second = false;
  std::thread other([&] { first = right<T>(gemm); });
  second = right<T>(gemm);
  other.join();
  return first && second;
}

}  // namespace

void set_blas(uintptr_t sgemm, uintptr_t dgemm, uintptr_t set_threads) {
  Blas found{reinterpret_cast<Sgemm>(sgemm), reinterpret_cast<Dgemm>(dgemm),
             reinterpret_cast<int (*)(int)>(set_threads)};
  if (found.sgemm && !right_from_two_threads<float>(found.sgemm)) throw std::runtime_error("sgemm_ failed its self-test");
  if (found.dgemm && !right_from_two_threads<double>(found.dgemm)) throw std::runtime_error("dgemm_ failed its self-test");
  blas() = found;
}

}  // namespace fastret
