// Checks, class layout and buffers of rank_sums. Nothing here depends on the instruction set.
#include <tuple>

#include "../common/buffer.h"
#include "rank_sums.h"

namespace fastret {
namespace {

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

void check_problem(const RankSumsProblem& p) {
  require(is_float(p.x.dtype), "x", "not a floating point type");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.y, "y", p.y.rows, p.x.cols, p.x.dtype);
  check(p.order, "order", 1, p.y.rows, DType::i64);
  check(p.start, "start", 1, p.x.rows, DType::i64);
  check(p.count, "count", 1, p.x.rows, DType::i64);
  require(!p.symmetric || (p.y.rows == p.x.rows && p.y.data == p.x.data), "y", "not x itself");
  require(p.symmetric || !p.exclude_self, "exclude_self", "needs gallery = batch");
  require(p.x.cols > 0, "x", "no columns");
  require(p.temperature > 0, "temperature", "must be positive");
  require(p.threads >= 1, "threads", "must be at least 1");
}

// Buffers of one call; `work` points into them.
struct Setup {
  ClassLayout layout;
  Buffer x, y, x_norm, y_norm, positives, slopes, dx, dy, threads;
  std::vector<int64_t> dx_cycles, dy_cycles;
  RankSumsWork work;
  int64_t item;

  explicit Setup(const RankSumsProblem& p)
      : layout(class_layout(p.order.as<int64_t>(), p.start.as<int64_t>(), p.count.as<int64_t>(), p.x.rows, p.y.rows,
                            p.symmetric)),
        work{p, layout, plan(p.x.rows, p.y.rows, p.symmetric, p.threads)},
        item(item_size(accumulate_in(p.x.dtype))) {
    const int64_t d = p.x.cols;
    work.pack_x = !in_place(p, p.x, layout.queries_in_order);
    x = Buffer(work.pack_x ? p.x.rows * d * item : 0);
    work.x = work.pack_x ? x.get() : p.x.data;
    x_norm = Buffer(p.normalize ? p.x.rows * item : 0);
    work.x_norm = x_norm.get();
    work.y = work.x;
    work.y_norm = work.x_norm;
    work.pack_y = false;
    if (!p.symmetric) {
      work.pack_y = !in_place(p, p.y, layout.items_in_order);
      y = Buffer(work.pack_y ? p.y.rows * d * item : 0);
      work.y = work.pack_y ? y.get() : p.y.data;
      y_norm = Buffer(p.normalize ? p.y.rows * item : 0);
      work.y_norm = y_norm.get();
    }
    positives = Buffer(layout.pairs() * item);
    work.positives = positives.get();
    work.thread_bytes = (kernels().thread_elements(work.plan, layout.largest) * item + 63) / 64 * 64;
    threads = Buffer(work.thread_bytes * p.threads);
    work.threads = static_cast<char*>(threads.get());
  }

  RankSumsKernels kernels() const { return rank_sums_kernels(item == 8); }

  static bool in_place(const RankSumsProblem& p, const Array& a, bool in_order) {
    return !p.normalize && in_order && a.dtype == accumulate_in(a.dtype) && a.stride == a.cols;
  }

  // Accumulates in the output itself where its type allows, and unsorts it in place at the end.
  void* gradient(const Array& out, Buffer& buffer, const int64_t* order, std::vector<int64_t>& cycles) {
    if (!out.data) return nullptr;
    if (out.dtype == accumulate_in(out.dtype)) {
      cycles = cycle_leaders(order, out.rows);
      return out.data;
    }
    buffer = Buffer(out.rows * out.cols * item);
    return buffer.get();
  }
};

}  // namespace

void rank_sums_forward(const RankSumsProblem& p, const Array& rank_all, const Array& rank_pos) {
  check_problem(p);
  Setup setup(p);
  check(rank_all, "rank_all", 1, setup.layout.pairs(), accumulate_in(p.x.dtype));
  check(rank_pos, "rank_pos", 1, setup.layout.pairs(), accumulate_in(p.x.dtype));
  setup.kernels().forward(setup.work, rank_all, rank_pos);
}

void rank_sums_backward(const RankSumsProblem& p, const Array& grad_all, const Array& grad_pos, const Array& dx,
                        const Array& dy) {
  check_problem(p);
  Setup setup(p);
  check(grad_all, "grad_all", 1, setup.layout.pairs(), accumulate_in(p.x.dtype));
  check(grad_pos, "grad_pos", 1, setup.layout.pairs(), accumulate_in(p.x.dtype));
  for (const auto& [out, in, name] : {std::tuple{&dx, &p.x, "dx"}, std::tuple{&dy, &p.y, "dy"}}) {
    if (!out->data) continue;
    check(*out, name, in->rows, in->cols, p.x.dtype);
    require(out->stride == out->cols, name, "not contiguous");
  }
  require(!p.symmetric || !dy.data, "dy", "gallery = batch has one gradient");
  setup.slopes = Buffer(setup.layout.pairs() * setup.item);
  setup.work.slopes = setup.slopes.get();
  setup.work.dx = setup.gradient(dx, setup.dx, setup.layout.query_order.data(), setup.dx_cycles);
  setup.work.dy = p.symmetric ? setup.work.dx : setup.gradient(dy, setup.dy, p.order.as<int64_t>(), setup.dy_cycles);
  setup.work.dx_cycles = setup.dx_cycles.data();
  setup.work.dx_cycle_count = int64_t(setup.dx_cycles.size());
  setup.work.dy_cycles = setup.dy_cycles.data();
  setup.work.dy_cycle_count = int64_t(setup.dy_cycles.size());
  setup.kernels().backward(setup.work, grad_all, grad_pos, dx, dy);
}

}  // namespace fastret
