// pair_dot on the CPU. pair_dot_setup.cpp checks, groups pairs by row and allocates; pair_dot.cpp, once per instruction
// set, computes. The definition is fastret/backends/reference/pair_dot.py.
#pragma once
#include "../common/array.h"
#include "../common/groups.h"

namespace fastret {

struct PairDotProblem {
  Array x, y;         // (N, D), (M, D); y is x where `symmetric`
  Array row, column;  // int64 (1, P)
  bool symmetric = false;
  bool normalize = true;
  int threads = 1;
};

void pair_dot_forward(const PairDotProblem&, const Array& scores);  // out: (1, P)

// in: grad (1, P). out: dx (N, D), dy (M, D); no data where not wanted. Where symmetric, dx is that of both sides.
void pair_dot_backward(const PairDotProblem&, const Array& grad, const Array& dx, const Array& dy);

struct PairDotWork {
  const PairDotProblem& problem;
  void *x_norm = nullptr, *y_norm = nullptr;  // divisors of the rows, where normalised
  Groups by_row, by_column;                   // backward: the pairs of each row of one side
  void* threads = nullptr;                    // thread_elements per thread
  int64_t thread_elements = 0;
};

struct PairDotKernels {
  void (*forward)(const PairDotWork&, const Array& scores);
  void (*backward)(const PairDotWork&, const Array& grad, const Array& dx, const Array& dy);
};

namespace base { PairDotKernels pair_dot_kernels(bool doubles); }
namespace avx2 { PairDotKernels pair_dot_kernels(bool doubles); }
namespace avx512 { PairDotKernels pair_dot_kernels(bool doubles); }

PairDotKernels pair_dot_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
