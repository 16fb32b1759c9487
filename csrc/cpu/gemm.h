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

// R rows x W vectors of C, of which `cols` elements exist. B's W vectors stand b_step apart from one depth to the next.
template <class T, int R, int W>
inline void micro_kernel(int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* b, int64_t b_step,
                         T* c, int64_t c_stride, int64_t cols, bool add) {
  constexpr int V = lanes<T>;
  Vec<T> result[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) result[r][w] = Vec<T>{};
  for (int64_t p = 0; p < depth; ++p, b += b_step) {
    Vec<T> right[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) right[w] = load<T>(b + w * V);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = splat(a[r * row_step + p * depth_step]);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) result[r][w] += s * right[w];
    }
  }
  if (cols == W * V) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        T* out = c + r * c_stride + w * V;
        store<T>(out, add ? result[r][w] + load<T>(out) : result[r][w]);
      }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += c_stride) {  // by way of memory: indexed, the result would not stay in registers
    T row[W * V];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) store<T>(row + w * V, result[r][w]);
    for (int64_t j = 0; j < cols; ++j) c[j] = add ? c[j] + row[j] : row[j];
  }
}

template <class T, int W, int R = kRows>
inline void micro_rows(int64_t rows, int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* b,
                       int64_t b_step, T* c, int64_t c_stride, int64_t cols, bool add) {
  if (rows >= R)
    return micro_kernel<T, R, W>(depth, a, row_step, depth_step, b, b_step, c, c_stride, cols, add);
  if constexpr (R > 1)
    micro_rows<T, W, R - 1>(rows, depth, a, row_step, depth_step, b, b_step, c, c_stride, cols, add);
}

// C (rows x cols) = or += A B of operands used where they lie: A's element (r, p) at a + r row_step + p depth_step, B's
// row p at b + p b_step, padded to whole vectors. For products of which one dimension is a few vectors: B is not
// packed, what is one vector wide takes one, and rows go in even groups.
template <class T>
void multiply(int64_t rows, int64_t depth, const T* a, int64_t row_step, int64_t depth_step, const T* b, int64_t b_step,
              T* c, int64_t c_stride, int64_t cols, bool add) {
  constexpr int64_t V = lanes<T>;
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t p = 0; p < depth; p += kDepth)  // sums of sums lose fewer digits
    for (int64_t j = 0; j < cols; j += 2 * V)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = rows * g / groups, count = rows * (g + 1) / groups - begin;
        const int64_t steps = std::min(kDepth, depth - p), width = std::min(2 * V, cols - j);
        const T *left = a + begin * row_step + p * depth_step, *right = b + p * b_step + j;
        T* out = c + begin * c_stride + j;
        const bool more = add || p > 0;
        const auto kernel = width > V ? micro_rows<T, 2> : micro_rows<T, 1>;
        kernel(count, steps, left, row_step, depth_step, right, b_step, out, c_stride, width, more);
      }
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
          micro_rows<T, 2>(m - i, depth, a + i * row_step + p * depth_step, row_step, depth_step,
                           workspace + q * depth, W, c + i * c_stride + j + q, c_stride, std::min(W, cols - q),
                           add || p > 0);
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
