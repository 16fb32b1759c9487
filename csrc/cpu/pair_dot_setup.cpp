// Checks, groups and buffers of pair_dot. Nothing here depends on the instruction set.
#include "pair_dot.h"

#include "../common/buffer.h"

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

void check_problem(const PairDotProblem& p) {
  require(is_float(p.x.dtype), "x", "not a floating point type");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.y, "y", p.y.rows, p.x.cols, p.x.dtype);
  require(!p.symmetric || (p.y.rows == p.x.rows && p.y.data == p.x.data), "y", "not x itself");
  require(p.threads >= 1, "threads", "must be at least 1");
  check_index(p.row, "row", p.row.cols, p.x.rows, 0);
  check_index(p.column, "column", p.row.cols, p.y.rows, 0);
}

// Buffers of one call; `work` points into them.
struct Setup {
  Buffer x_norm, y_norm, threads, row_start, row_order, column_start, column_order;
  PairDotWork work;
  int64_t item;

  explicit Setup(const PairDotProblem& p) : work{p}, item(item_size(accumulate_in(p.x.dtype))) {
    x_norm = Buffer(p.normalize ? p.x.rows * item : 0);
    y_norm = Buffer(p.normalize && !p.symmetric ? p.y.rows * item : 0);
    work.x_norm = x_norm.get();
    work.y_norm = p.symmetric ? work.x_norm : y_norm.get();
    work.thread_elements = (3 * p.x.cols + 31) / 32 * 32;
    threads = Buffer(work.thread_elements * p.threads * item);
    work.threads = threads.get();
  }

  PairDotKernels kernels() const { return pair_dot_kernels(item == 8); }
};

void check_gradient(const Array& out, const Array& rows, const char* name) {
  if (out.data || out.rows) check(out, name, rows.rows, rows.cols, rows.dtype);
}

}  // namespace

void pair_dot_forward(const PairDotProblem& p, const Array& scores) {
  check_problem(p);
  check(scores, "scores", 1, p.row.cols, accumulate_in(p.x.dtype));
  const Setup setup(p);
  setup.kernels().forward(setup.work, scores);
}

void pair_dot_backward(const PairDotProblem& p, const Array& grad, const Array& dx, const Array& dy) {
  check_problem(p);
  check(grad, "grad", 1, p.row.cols, accumulate_in(p.x.dtype));
  check_gradient(dx, p.x, "dx");
  check_gradient(dy, p.y, "dy");
  require(!p.symmetric || !dy.data, "dy", "y = x has one gradient");
  Setup setup(p);
  if (dx.data) setup.work.by_row = group(p.row, p.x.rows, setup.row_start, setup.row_order);
  if (dy.data || (p.symmetric && dx.data))
    setup.work.by_column = group(p.column, p.y.rows, setup.column_start, setup.column_order);
  setup.kernels().backward(setup.work, grad, dx, dy);
}

}  // namespace fastret
