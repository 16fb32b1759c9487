// Checks and buffers of sampled_dot. Nothing here depends on the instruction set.
#include "sampled_dot.h"

#include <limits>

#include "../common/buffer.h"
#include "../common/groups.h"

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

DType check_problem(const SampledDotProblem& p) {
  require(is_float(p.x.dtype), "x", "not a floating point type");
  require(is_float(p.bank.dtype), "bank", "not a floating point type");
  const DType real = accumulate_in(p.x.dtype);
  require(accumulate_in(p.bank.dtype) == real, "bank", "expected rows that are accumulated in the same type as x");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.bank, "bank", p.bank.rows, p.x.cols);
  require(p.bank.rows <= int64_t(1) << 31, "bank", "more than 2^31 rows");
  require(p.x.rows == 0 || p.bank.rows > 0, "bank", "no rows");
  require(p.count >= 0, "count", "must not be negative");
  require(p.draws() != (p.index.cols > 0), "index, count", "expected one of them");
  require(p.threads >= 1, "threads", "must be at least 1");
  if (p.has_first()) check_index(p.first, "first", p.x.rows, p.bank.rows, 0);
  if (!p.draws()) {
    check(p.index, "index", p.x.rows, p.index.cols, DType::i64);
    for (int64_t i = 0; i < p.index.rows; ++i)
      for (int64_t k = 0; k < p.index.cols; ++k) {
        const int64_t column = p.index.as<int64_t>()[i * p.index.stride + k];
        require(column >= 0 && column < p.bank.rows, "index", "out of range");
      }
  }
  return real;
}

// A thread's rows and columns; see Space in sampled_dot.cpp.
struct Setup {
  Buffer threads;
  SampledDotWork work;

  Setup(const SampledDotProblem& p, DType real) : work{p} {
    constexpr int64_t kColumns = 256 * int64_t(sizeof(int64_t));
    work.thread_bytes = 3 * ((p.x.cols * item_size(real) + 63) / 64 * 64) + kColumns;
    threads = Buffer(work.thread_bytes * p.threads);
    work.threads = static_cast<char*>(threads.get());
  }
};

}  // namespace

void sampled_dot_forward(const SampledDotProblem& p, const Array& scores) {
  const DType real = check_problem(p);
  check(scores, "scores", p.x.rows, p.columns(), real);
  const Setup setup(p, real);
  sampled_dot_kernels(real == DType::f64).forward(setup.work, scores);
}

void sampled_dot_backward(const SampledDotProblem& p, const Array& grad, const Array& dx, const Array& d_bank) {
  const DType real = check_problem(p);
  check(grad, "grad", p.x.rows, p.columns(), real);
  if (dx.data || dx.rows) check(dx, "dx", p.x.rows, p.x.cols, p.x.dtype);
  if (d_bank.data || d_bank.rows) check(d_bank, "d_bank", p.bank.rows, p.bank.cols, real);
  const Setup setup(p, real);
  sampled_dot_kernels(real == DType::f64).backward(setup.work, grad, dx, d_bank);
}

}  // namespace fastret
