// Checks, order of the rows and buffers of segment_mean. Nothing here depends on the instruction set.
#include "segment_mean.h"

#include <algorithm>

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// Slices change no sum. There are several where one segment is too large a part of the rows for one thread.
int64_t slice_of(const Groups& rows, int64_t segments, int64_t d, int threads) {
  constexpr int64_t kLeast = 64;  // features, whole cache lines of a row
  if (threads == 1 || segments == 0) return d;
  int64_t largest = 0;
  for (int64_t s = 0; s < segments; ++s) largest = std::max(largest, rows.start[s + 1] - rows.start[s]);
  if (2 * largest * threads <= rows.start[segments] - rows.start[0]) return d;
  return std::min(d, std::max(kLeast, (d + threads - 1) / threads));
}

}  // namespace

void segment_mean_forward(const SegmentMeanProblem& p, const Array& x, const Array& result, const Array& counts) {
  require(x.dtype != DType::i64, "x", "not a floating point type");
  require(p.threads >= 1, "threads", "must be at least 1");
  check(x, "x", x.rows, x.cols);
  const DType real = accumulate_in(x.dtype);
  check(result, "result", result.rows, x.cols, real);
  check(counts, "counts", 1, result.rows, DType::i64);
  check_index(p.index, "index", x.rows, result.rows, INT64_MIN);
  Buffer starts, orders;
  SegmentMeanWork work{p, group(p.index, result.rows, starts, orders)};
  for (int64_t s = 0; s < result.rows; ++s) counts.as<int64_t>()[s] = work.rows.start[s + 1] - work.rows.start[s];
  work.slice = slice_of(work.rows, result.rows, x.cols, p.threads);
  const Buffer threads(p.threads * work.slice * int64_t(sizeof(double)));
  work.threads = static_cast<double*>(threads.get());
  segment_mean_kernels(real == DType::f64).forward(work, x, result);
}

void segment_mean_backward(const SegmentMeanProblem& p, const Array& grad, const Array& counts, const Array& dx) {
  require(dx.dtype != DType::i64, "dx", "not a floating point type");
  require(p.threads >= 1, "threads", "must be at least 1");
  check(dx, "dx", dx.rows, dx.cols);
  const DType real = accumulate_in(dx.dtype);
  check(grad, "grad", grad.rows, dx.cols, real);
  check(counts, "counts", 1, grad.rows, DType::i64);
  check_index(p.index, "index", dx.rows, grad.rows, INT64_MIN);
  segment_mean_kernels(real == DType::f64).backward(p, grad, counts, dx);
}

}  // namespace fastret
