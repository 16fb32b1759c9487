// sampled_dot on CUDA. The definition is fastret/backends/reference/sampled_dot.py, that of the draws
// fastret/backends/sampling.py.
#pragma once
#include "../common/array.h"

namespace fastret {
namespace cuda {

struct SampledDotProblem {
  Array x, bank;  // (N, D), (C, D): float32, bfloat16 or float16 each
  Array first;    // int64 (1, N), the column of score 0; empty: no such score
  Array index;    // int64 (N, K); empty: `count` columns are drawn
  Array seed;     // int64 (1, 1), on the device: it is never waited for
  int64_t count = 0;

  bool has_first() const { return first.data != nullptr || first.rows > 0; }
  int64_t own() const { return has_first() ? 1 : 0; }
  int64_t columns() const { return own() + (count > 0 ? count : index.cols); }
};

// out: scores (N, columns) float32.
void sampled_dot_forward(const SampledDotProblem&, const Array& scores, uintptr_t stream);

// Into how many parts backward cuts the columns, on the device that is current: one where rows keep it busy.
int64_t sampled_dot_parts(const SampledDotProblem&);

// in: grad (N, columns) float32. out: dx (N, D) in the type of x. partial: float32 (parts N, D) where there are several.
void sampled_dot_backward(const SampledDotProblem&, const Array& grad, const Array& partial, const Array& dx,
                          uintptr_t stream);

}  // namespace cuda
}  // namespace fastret
