// Checks and buffers of topk. Nothing here depends on the instruction set.
#include <algorithm>
#include <limits>

#include "../common/buffer.h"
#include "topk.h"

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

DType check_problem(const TopkProblem& p) {
  require(is_float(p.x.dtype), "x", "not a floating point type");
  require(is_float(p.y.dtype), "y", "not a floating point type");
  const DType real = accumulate_in(p.x.dtype);
  require(accumulate_in(p.y.dtype) == real, "y", "expected rows that are accumulated in the same type as x");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.y, "y", p.y.rows, p.x.cols);
  require(p.y.rows <= int64_t(std::numeric_limits<uint32_t>::max()), "y", "2^32 rows and more have to come in pieces");
  require(p.k >= 1, "k", "must be at least 1");
  require(p.threads >= 1, "threads", "must be at least 1");
  check_mask(p.mask, "mask", p.x.rows, p.y.rows, real);
  return real;
}

}  // namespace

void topk(const TopkProblem& p, const Array& scores, const Array& indices) {
  const DType real = check_problem(p);
  check(scores, "scores", p.x.rows, p.k, real);
  check(indices, "indices", p.x.rows, p.k, DType::i64);
  const int64_t n = p.x.rows, m = p.y.rows, key_bytes = 2 * item_size(real);
  TopkWork work{p, {}};
  work.keep = std::min(p.k, m);
  work.plan = topk_plan(n, m, work.keep, key_bytes, p.threads);
  work.pack_y = p.metric == TopkMetric::cosine || p.y.dtype != real;
  const int64_t lists = work.plan.parts > 1 ? n * work.plan.parts : 0;
  const Buffer parts(lists * work.keep * key_bytes), part_counts(lists * int64_t(sizeof(int64_t)));
  work.parts = parts.get();
  work.part_counts = static_cast<int64_t*>(part_counts.get());
  const TopkKernels kernels = topk_kernels(real == DType::f64);
  work.thread_bytes = kernels.thread_bytes(work);
  const Buffer threads(work.thread_bytes * p.threads);
  work.threads = static_cast<char*>(threads.get());
  kernels.run(work, scores, indices);
}

}  // namespace fastret
