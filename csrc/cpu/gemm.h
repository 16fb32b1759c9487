// C = or += op(A) op(B) for one tile, by the calling thread alone: the process's BLAS or the micro-kernel below.
//
// The micro-kernel holds kRows x 2 vectors of C in registers, reads A in place (one broadcast an element) and B from
// panels of two vectors' width packed into the workspace (kDepth x kCols elements, a quarter of an L2).
#pragma once
#include <algorithm>

#include "blas.h"
#include "settings.h"
#include "simd.h"

FASTRET_ISA_BEGIN

enum class Op { none, transpose };

constexpr int64_t kDepth = 256, kCols = 256;
#if FASTRET_VECTOR_BYTES == 64
constexpr int kRows = 14;  // 28 accumulators, 2 of B and a broadcast in 32 registers
#else
constexpr int kRows = 6;  // 12 + 2 + 1 in 16 registers
#endif
constexpr int64_t kGemmWorkspace = kDepth * kCols;

template <class T, int R>
inline void micro_kernel(int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* panel, T* c,
                         int64_t c_stride, int64_t cols, bool add) {
  constexpr int V = lanes<T>;
  Vec<T> left[R], right[R];
  for (int r = 0; r < R; ++r) left[r] = right[r] = Vec<T>{};
  for (int64_t p = 0; p < depth; ++p, panel += 2 * V) {
    const Vec<T> b0 = load<T>(panel), b1 = load<T>(panel + V);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = splat(a[r * row_step + p * depth_step]);
      left[r] += s * b0;
      right[r] += s * b1;
    }
  }
  for (int r = 0; r < R; ++r, c += c_stride) {
    if (cols == 2 * V) {
      store<T>(c, add ? left[r] + load<T>(c) : left[r]);
      store<T>(c + V, add ? right[r] + load<T>(c + V) : right[r]);
      continue;
    }
    for (int64_t j = 0; j < cols; ++j) {
      const T value = j < V ? left[r][j] : right[r][j - V];
      c[j] = add ? c[j] + value : value;
    }
  }
}

template <class T, int R = kRows>
inline void micro_rows(int64_t rows, int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* panel,
                       T* c, int64_t c_stride, int64_t cols, bool add) {
  if (rows >= R) return micro_kernel<T, R>(depth, a, row_step, depth_step, panel, c, c_stride, cols, add);
  if constexpr (R > 1) micro_rows<T, R - 1>(rows, depth, a, row_step, depth_step, panel, c, c_stride, cols, add);
}

// Panels of 2 * lanes columns of op(B) (depth x cols), each stored depth-major; missing columns are zero.
template <class T> void pack_panels(Op op, const T* b, int64_t b_stride, int64_t depth, int64_t cols, T* panels) {
  constexpr int64_t V = lanes<T>, W = 2 * V;
  for (int64_t j = 0; j < cols; j += W) {
    T* panel = panels + j * depth;
    const int64_t width = std::min(W, cols - j);
    if (op == Op::transpose && width == W) {
      transpose<false>(b + j * b_stride, b_stride, W, depth, panel, W);
      continue;
    }
    for (int64_t p = 0; p < depth; ++p) {
      T* out = panel + p * W;
      if (op == Op::none && width == W) {
        store<T>(out, load<T>(b + p * b_stride + j));
        store<T>(out + V, load<T>(b + p * b_stride + j + V));
        continue;
      }
      for (int64_t k = 0; k < W; ++k)
        out[k] = k >= width ? T(0) : op == Op::none ? b[p * b_stride + j + k] : b[(j + k) * b_stride + p];
    }
  }
}

template <class T>
void own_gemm(Op op_a, Op op_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b,
              int64_t b_stride, bool add, T* c, int64_t c_stride, T* workspace) {
  constexpr int64_t W = 2 * lanes<T>;
  const int64_t row_step = op_a == Op::none ? a_stride : 1, depth_step = op_a == Op::none ? 1 : a_stride;
  for (int64_t p = 0; p < k; p += kDepth)
    for (int64_t j = 0; j < n; j += kCols) {
      const int64_t depth = std::min(kDepth, k - p), cols = std::min(kCols, n - j);
      pack_panels(op_b, op_b == Op::none ? b + p * b_stride + j : b + j * b_stride + p, b_stride, depth, cols, workspace);
      for (int64_t i = 0; i < m; i += kRows)
        for (int64_t q = 0; q < cols; q += W)
          micro_rows<T>(m - i, depth, a + i * row_step + p * depth_step, row_step, depth_step, workspace + q * depth,
                        c + i * c_stride + j + q, c_stride, std::min(W, cols - q), add || p > 0);
    }
}

inline void blas_gemm(const char* a, const char* b, const int* m, const int* n, const int* k, const float* A,
                      const int* lda, const float* B, const int* ldb, const float* beta, float* C, const int* ldc) {
  const float one = 1;
  blas().sgemm(a, b, m, n, k, &one, A, lda, B, ldb, beta, C, ldc);
}
inline void blas_gemm(const char* a, const char* b, const int* m, const int* n, const int* k, const double* A,
                      const int* lda, const double* B, const int* ldb, const double* beta, double* C, const int* ldc) {
  const double one = 1;
  blas().dgemm(a, b, m, n, k, &one, A, lda, B, ldb, beta, C, ldc);
}

// Row-major: op(A) is m x k, op(B) is k x n. workspace: kGemmWorkspace elements of this thread's own.
template <class T>
void gemm(Op op_a, Op op_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
          bool add, T* c, int64_t c_stride, T* workspace) {
  if (m == 0 || n == 0) return;
  constexpr int64_t kSmall = 16 * 1024;  // below this many products a BLAS call costs more than it saves
  if (!settings().use_blas || !blas().available<T>() || m * n * k < kSmall)
    return own_gemm(op_a, op_b, m, n, k, a, a_stride, b, b_stride, add, c, c_stride, workspace);
  const int im = int(m), in = int(n), ik = int(k), ia = int(a_stride), ib = int(b_stride), ic = int(c_stride);
  const T beta = add ? T(1) : T(0);
  blas_gemm(op_b == Op::none ? "N" : "T", op_a == Op::none ? "N" : "T", &in, &im, &ik, b, &ib, a, &ia, &beta, c, &ic);
}

FASTRET_ISA_END
