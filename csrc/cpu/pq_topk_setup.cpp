// Checks and buffers of pq_topk. Nothing here depends on the instruction set.
#include <algorithm>
#include <limits>

#include "../common/buffer.h"
#include "pq_topk.h"

namespace fastret {
namespace {

DType check_problem(const PqTopkProblem& p) {
  const DType real = p.query.dtype;
  require(real == DType::f32 || real == DType::f64, "query", "expected float32 or float64");
  require(p.codes.dtype == DType::u8 || p.codes.dtype == DType::u16, "codes", "expected 8 or 16 bits each");
  const int64_t most = p.codes.dtype == DType::u8 ? 256 : 65536, m = p.books();
  require(m >= 1, "codes", "expected at least one book");
  require(p.words >= 1 && p.words <= most, "words", "expected 1 to " + std::to_string(most));
  require(p.codebook.cols >= 1, "codebook", "expected at least one column");
  check(p.codebook, "codebook", m * p.words, p.codebook.cols, real);
  check(p.query, "query", p.query.rows, m * p.codebook.cols);
  check(p.codes, "codes", p.codes.rows, m);
  require(p.codes.rows <= int64_t(std::numeric_limits<uint32_t>::max()), "codes",
          "2^32 rows and more have to come in pieces");
  require(p.k >= 1, "k", "must be at least 1");
  require(p.threads >= 1, "threads", "must be at least 1");
  return real;
}

}  // namespace

void pq_topk(const PqTopkProblem& p, const Array& scores, const Array& indices) {
  const DType real = check_problem(p);
  check(scores, "scores", p.query.rows, p.k, real);
  check(indices, "indices", p.query.rows, p.k, DType::i64);
  const PqTopkKernels kernels = pq_topk_kernels(real == DType::f64);
  const int64_t queries = p.query.rows, n = p.codes.rows, key_bytes = 2 * item_size(real);
  PqTopkWork work{p, {}};
  work.keep = std::min(p.k, n);
  work.plan = pq_topk_plan((queries + kernels.lanes - 1) / kernels.lanes, n, p.words, work.keep, p.threads);
  const int64_t lists = work.plan.parts > 1 ? queries * work.plan.parts : 0;
  const Buffer parts(lists * work.keep * key_bytes), part_counts(lists * int64_t(sizeof(int64_t)));
  work.parts = parts.get();
  work.part_counts = static_cast<int64_t*>(part_counts.get());
  work.thread_bytes = kernels.thread_bytes(work);
  const Buffer threads(work.thread_bytes * p.threads);
  work.threads = static_cast<char*>(threads.get());
  kernels.run(work, scores, indices);
}

}  // namespace fastret
