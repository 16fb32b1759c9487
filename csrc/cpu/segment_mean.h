// segment_mean on the CPU. segment_mean_setup.cpp checks, sorts rows by segment and allocates; segment_mean.cpp, once per
// instruction set, computes. The definition is fastret/backends/reference/segment_mean.py.
#pragma once
#include "../common/array.h"
#include "../common/groups.h"

namespace fastret {

struct SegmentMeanProblem {
  Array index;  // int64 (1, N), below the number of segments; negative: of none
  bool mean = true;
  int threads = 1;
};

// in: x (N, D). out: result (S, D), counts int64 (1, S).
void segment_mean_forward(const SegmentMeanProblem&, const Array& x, const Array& result, const Array& counts);

// in: grad (S, D), counts. out: dx (N, D).
void segment_mean_backward(const SegmentMeanProblem&, const Array& grad, const Array& counts, const Array& dx);

struct SegmentMeanWork {
  const SegmentMeanProblem& problem;
  Groups rows;                  // of each segment
  int64_t slice = 0;            // features that a thread sums at a time
  double* threads = nullptr;    // `slice` sums per thread
};

struct SegmentMeanKernels {
  void (*forward)(const SegmentMeanWork&, const Array& x, const Array& result);
  void (*backward)(const SegmentMeanProblem&, const Array& grad, const Array& counts, const Array& dx);
};

namespace base { SegmentMeanKernels segment_mean_kernels(bool doubles); }
namespace avx2 { SegmentMeanKernels segment_mean_kernels(bool doubles); }
namespace avx512 { SegmentMeanKernels segment_mean_kernels(bool doubles); }

SegmentMeanKernels segment_mean_kernels(bool doubles);  // of the instruction set in use

}  // namespace fastret
