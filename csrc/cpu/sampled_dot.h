// sampled_dot on the CPU. sampled_dot_setup.cpp checks and allocates; sampled_dot.cpp, once per instruction set,
// computes. The definition is fastret/backends/reference/sampled_dot.py, that of the draws fastret/backends/sampling.py.
#pragma once
#include "../common/array.h"

namespace fastret {

struct SampledDotProblem {
  Array x, bank;  // (N, D), (C, D), of types that may differ where neither is float64
  Array first;    // int64 (1, N), the column of score 0; empty: no such score
  Array index;    // int64 (N, K); empty: `count` columns are drawn
  uint64_t seed = 0;
  int64_t count = 0;
  int threads = 1;

  bool has_first() const { return first.data != nullptr || first.rows > 0; }
  bool draws() const { return count > 0; }
  int64_t own() const { return has_first() ? 1 : 0; }
  int64_t columns() const { return own() + (draws() ? count : index.cols); }
};

// out: scores (N, columns).
void sampled_dot_forward(const SampledDotProblem&, const Array& scores);

// in: grad (N, columns). out: dx (N, D) in the type of x, d_bank (C, D) in that of sums; either may be empty.
void sampled_dot_backward(const SampledDotProblem&, const Array& grad, const Array& dx, const Array& d_bank);

struct SampledDotWork {
  const SampledDotProblem& problem;
  char* threads = nullptr;  // a workspace of thread_bytes per thread
  int64_t thread_bytes = 0;
};

struct SampledDotKernels {
  void (*forward)(const SampledDotWork&, const Array& scores);
  void (*backward)(const SampledDotWork&, const Array& grad, const Array& dx, const Array& d_bank);
};

namespace base { SampledDotKernels sampled_dot_kernels(bool doubles); }
namespace avx2 { SampledDotKernels sampled_dot_kernels(bool doubles); }
namespace avx512 { SampledDotKernels sampled_dot_kernels(bool doubles); }

SampledDotKernels sampled_dot_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
