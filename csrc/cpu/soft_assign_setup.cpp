// Checks and buffers of soft_assign. Nothing here depends on the instruction set.
#include <algorithm>

#include "../common/buffer.h"
#include "soft_assign.h"

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// What is read or written in one piece.
void check_whole(const Array& a, const char* name, int64_t rows, int64_t cols, DType dtype) {
  check(a, name, rows, cols, dtype);
  require(rows == 1 || a.stride == cols, name, "expected rows one after another");
}
// What may be missing.
void check_maybe(const Array& a, const char* name, int64_t rows, int64_t cols, DType dtype) {
  if (a.data) check(a, name, rows, cols, dtype);
}
void check_whole_maybe(const Array& a, const char* name, int64_t rows, int64_t cols, DType dtype) {
  if (a.data) check_whole(a, name, rows, cols, dtype);
}

DType check_problem(const SoftAssignProblem& p) {
  const Array& rows = p.rows();
  require(rows.dtype != DType::i64, p.keys.data ? "x" : "logits", "not a floating point type");
  const DType real = accumulate_in(rows.dtype);
  require(p.books >= 1 && p.codebook.rows >= p.books && p.codebook.rows % p.books == 0 && p.codebook.cols >= 1,
          "codebook", "expected words, as many in each book");
  require(p.words() <= 1 << 16, "codebook", "expected at most 65,536 words a book");
  check_whole(p.codebook, "codebook", p.codebook.rows, p.codebook.cols, real);
  if (p.keys.data) {
    require(p.keys.cols >= 1, "keys", "no columns");
    check_whole(p.keys, "keys", p.codebook.rows, p.keys.cols, real);
    check(p.x, "x", p.x.rows, p.books * p.keys.cols);
  } else {
    check(p.logits, "logits", p.logits.rows, p.codebook.rows);
  }
  require(!p.bias.data || p.keys.data, "bias", "needs keys");
  check_whole_maybe(p.bias, "bias", p.books, p.words(), real);
  require(p.threads >= 1, "threads", "must be at least 1");
  return real;
}

// Buffers of one call whose sums over rows have `sums` elements; `work` points into them.
struct Setup {
  SoftAssignWork work;
  SoftAssignKernels kernels;
  Buffer sums, dots, threads;

  Setup(const SoftAssignProblem& p, DType real, int64_t sum_elements, bool need_dots)
      : work{p, {}}, kernels(soft_assign_kernels(real == DType::f64)) {
    const int64_t item = item_size(real), n = p.rows().rows;
    work.plan = assign_plan(n, p.books, p.words(), sum_elements * item, item, p.threads);
    work.range_sums = sum_elements;
    if (!work.plan.by_words) sums = Buffer((work.plan.ranges - 1) * sum_elements * item);
    if (work.plan.by_words && need_dots) dots = Buffer(p.books * n * item);
    work.sums = sums.get();
    work.dots = dots.get();
    work.thread_bytes = kernels.thread_bytes(work);
    threads = Buffer(work.thread_bytes * p.threads);
    work.threads = static_cast<char*>(threads.get());
  }
};

}  // namespace

void soft_assign_forward(const SoftAssignProblem& p, const SoftAssignResult& r) {
  const DType real = check_problem(p);
  const int64_t n = p.rows().rows;
  check(r.codes, "codes", n, p.books, DType::i64);
  check_maybe(r.lse, "lse", n, p.books, real);
  check_maybe(r.soft, "soft", n, p.books * p.codebook.cols, p.rows().dtype);
  check_whole_maybe(r.usage, "usage", p.books, p.words(), real);
  check_maybe(r.purity, "purity", n, p.books, real);
  require(n == 0 || r.lse.data || !(r.soft.data || r.usage.data || r.purity.data), "lse", "needed for what is wanted");
  const Setup setup(p, real, r.usage.data ? p.codebook.rows : 0, false);
  setup.kernels.forward(setup.work, r);
}

void soft_assign_backward(const SoftAssignProblem& p, const SoftAssignUpstream& u, const SoftAssignGradient& g) {
  const DType real = check_problem(p);
  const Array& rows = p.rows();
  const int64_t n = rows.rows, words = p.codebook.rows, width = p.codebook.cols;
  check_maybe(u.soft, "grad_soft", n, p.books * width, rows.dtype);
  check_maybe(u.hard, "grad_hard", n, p.books * width, rows.dtype);
  check_whole_maybe(u.usage, "grad_usage", p.books, p.words(), real);
  check_maybe(u.purity, "grad_purity", n, p.books, real);
  check_maybe(u.lse, "lse", n, p.books, real);
  check(u.codes, "codes", n, p.books, DType::i64);
  check_maybe(g.rows, "gradient of the rows", n, rows.cols, rows.dtype);
  check_whole_maybe(g.keys, "dkeys", words, p.keys.cols, real);
  check_whole_maybe(g.bias, "dbias", p.books, p.words(), real);
  check_whole_maybe(g.codebook, "dcodebook", words, width, real);
  require(!g.keys.data || p.keys.data, "dkeys", "needs keys");
  require(!g.bias.data || p.bias.data, "dbias", "needs a bias");
  const bool scores = g.rows.data || g.keys.data;
  require(n == 0 || !scores || (g.rows.data && u.lse.data && bool(g.keys.data) == bool(p.keys.data)), "gradients",
          "those of the scores are computed together, and need lse");
  require(n == 0 || u.lse.data || !(u.soft.data || u.usage.data || u.purity.data || u.straight_through), "lse",
          "needed for these gradients");
  const int64_t sums = (g.keys.data ? words * p.keys.cols : 0) + (g.bias.data ? words : 0) +
                       (g.codebook.data ? words * width : 0);
  const Setup setup(p, real, sums, scores);
  setup.kernels.backward(setup.work, u, g);
}

}  // namespace fastret
