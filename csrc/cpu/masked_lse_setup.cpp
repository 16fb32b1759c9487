// Checks and buffers of masked_lse. Nothing here depends on the instruction set.
#include <algorithm>
#include <limits>
#include <string>
#include <tuple>

#include "../common/buffer.h"
#include "masked_lse.h"

namespace fastret {
namespace {

constexpr int64_t kPadding = 64;  // elements: at least a vector of any instruction set

DType accumulate_in(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }
template <class T> constexpr DType type_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Offsets are read before an index is, and say where: their values are checked as sizes are. An index is only compared
// with the columns of a tile.
void check_list(const PairTarget& t, const std::string& name, int64_t n, DType real) {
  const int64_t entries = t.index.cols;
  check(t.offsets, (name + ".offsets").c_str(), 1, n + 1, DType::i64);
  check(t.index, (name + ".index").c_str(), 1, entries, DType::i64);
  check(t.weight, (name + ".weight").c_str(), 1, entries, real);
  const int64_t *offsets = t.offsets.as<int64_t>(), *index = t.index.as<int64_t>();
  require(offsets[0] == 0 && offsets[n] == entries && std::is_sorted(offsets, offsets + n + 1),
          (name + ".offsets").c_str(), "expected numbers that rise from 0 to " + std::to_string(entries));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t *first = index + offsets[i], *end = index + offsets[i + 1];
    require(first == end || (*first >= 0 && std::is_sorted(first, end)), (name + ".index").c_str(),
            "expected column numbers that ascend within a row");
  }
}

void check_target(const PairTarget& t, const std::string& name, int64_t n, int64_t m, DType real) {
  using Kind = PairTarget::Kind;
  require(t.kind >= Kind::none && t.kind <= Kind::listed, name.c_str(), "unknown kind");
  require(t.shifts.size() == t.weights.size(), name.c_str(), "needs one weight a shift");
  require(t.period >= 0, (name + ".period").c_str(), "must not be negative");
  if (t.kind == Kind::indexed) check(t.index, (name + ".index").c_str(), 1, n, DType::i64);
  if (t.kind == Kind::dense) check(t.dense, (name + ".weights").c_str(), n, m, real);
  if (t.kind == Kind::listed) check_list(t, name, n, real);
  if (t.kind != Kind::masked) return;
  check_mask(t.mask, name + ".mask", n, m, real);
  check(t.weight, (name + ".weight").c_str(), 1, n, real);
}

void check_levels(const MaskedLseProblem& p) {
  int64_t width = 0, heads = 0;
  for (const LseLevel& level : p.levels) {
    require(level.width > width && level.heads > 0, "levels", "expected ascending widths, and heads for each");
    width = level.width;
    heads += level.heads;
  }
  require(p.levels.empty() || (width == p.x.cols && heads == int64_t(p.heads.size())), "levels",
          "expected the last to be as wide as the rows, and a level for each head");
}

void check_problem(const MaskedLseProblem& p, Reduction last = Reduction::inverse_distance) {
  require(is_float(p.x.dtype), "x", "not a floating point type");
  check(p.x, "x", p.x.rows, p.x.cols);
  check(p.y, "y", p.y.rows, p.x.cols, p.x.dtype);
  require(!p.symmetric || (p.y.rows == p.x.rows && p.y.data == p.x.data), "y", "not x itself");
  const Centers& c = p.centers;
  require(c.count >= 1 && c.temperature >= 0, "centers", "expected at least 1, and a temperature >= 0");
  require(p.y.rows % c.count == 0, "y", "expected " + std::to_string(c.count) + " rows a class");
  require(c.count == 1 || (!p.symmetric && p.levels.size() <= 1), "centers", "expected a gallery, and one level");
  require(p.threads >= 1, "threads", "must be at least 1");
  require(!p.heads.empty(), "heads", "expected at least one");
  check_levels(p);
  const DType real = accumulate_in(p.x.dtype);
  for (size_t k = 0; k < p.heads.size(); ++k) {
    const LseHead& h = p.heads[k];
    const std::string name = "heads[" + std::to_string(k) + "]";
    check_mask(h.mask, name + ".mask", p.x.rows, p.columns(), real);
    check_target(h.target, name + ".target", p.x.rows, p.columns(), real);
    check_given(h.row_bias, name + ".row_bias", p.x.rows, real);
    check_given(h.col_bias, name + ".column_bias", p.columns(), real);
    require(h.reduce >= Reduction::lse && h.reduce <= last, (name + ".reduce").c_str(), "unknown kind");
  }
}

// Several levels need a running product and a tile of scores each, beside the transposed one. Smaller tiles, for all to
// stay in L2, were measured slower, by 11 to 28 % (AVX-512, 2 to 12 levels): products gain more from large ones.
// Several centres need a tile each as well.
int64_t tiles(const MaskedLseProblem& p) {
  if (p.centers.count > 1) return 2 + p.centers.count;
  return p.levels.size() > 1 ? 2 + int64_t(p.levels.size()) : 2;
}

int64_t length(const MaskedLseProblem& p, const LseHead& h) { return h.column ? p.columns() : p.x.rows; }

// Buffers of one call; `work` points into them.
template <class T> struct Setup {
  const MaskedLseProblem& problem;
  std::vector<Buffer> buffers;
  std::vector<LseHeadWork> heads;
  std::vector<LseLevelWork> levels;
  MaskedLseWork work;

  // Many more columns than a batch are parameters, or a memory bank, of which no copy is made: a window of them is
  // packed at a time; in a sweep by columns, threads pack blocks of their own.
  explicit Setup(const MaskedLseProblem& p, bool by_columns = false)
      : problem(p), heads(p.heads.size()),
        work{p, plan(p.x.rows, p.columns(), p.symmetric, p.threads, p.centers.count), {}} {
    const int64_t count = p.centers.count, bytes = p.y.cols * count * int64_t(sizeof(T));
    const bool part = packed(p.y) && p.y.rows > 2 * p.x.rows;
    work.window = part && !by_columns ? window(p.columns(), bytes, work.plan, p.threads) : p.columns();
    std::tie(work.x, work.x_norm, work.pack_x) = rows_of(p.x, p.x.rows);
    std::tie(work.y, work.y_norm, work.pack_y) = std::tie(work.x, work.x_norm, work.pack_x);
    if (part && by_columns) work.y = work.y_norm = nullptr, work.pack_y = true;
    else if (!p.symmetric) std::tie(work.y, work.y_norm, work.pack_y) = rows_of(p.y, work.window * count);
    for (size_t k = 0; k < heads.size(); ++k) {
      heads[k].head = &p.heads[k];
      if (p.heads[k].row_bias.data) heads[k].row_bias = vector(p.x.rows, T(0), p.heads[k].row_bias);
      if (p.heads[k].col_bias.data) heads[k].col_bias = vector(p.columns(), T(0), p.heads[k].col_bias);
    }
    work.heads = heads.data();
    work.head_count = int64_t(heads.size());
    add_levels();
    work.levels = levels.data();
    work.level_count = int64_t(levels.size());
    work.tiles = tiles(p);
  }

  static constexpr bool kDoubles = sizeof(T) == 8;
  MaskedLseKernels kernels() const { return masked_lse_kernels(kDoubles); }

  T* allocate(int64_t elements) {
    buffers.emplace_back(std::max<int64_t>(1, elements) * int64_t(sizeof(T)));
    return static_cast<T*>(buffers.back().get());
  }

  // n entries, of `from` where it has data, and the padding that the kernels rely on
  T* vector(int64_t n, T value, const Array& from = {}) {
    T* out = allocate(n + kPadding);
    if (from.data) std::copy(from.as<T>(), from.as<T>() + n, out);
    else std::fill(out, out + n, value);
    std::fill(out + n, out + n + kPadding, T(0));
    return out;
  }

  void add_levels() {
    if (problem.levels.empty()) levels.push_back({0, problem.x.cols, 0, int64_t(heads.size()), {}, {}});
    int64_t begin = 0, head = 0;
    for (const LseLevel& level : problem.levels) {
      levels.push_back({begin, level.width, head, head + level.heads, {}, {}});
      begin = level.width;
      head += level.heads;
    }
    if (!problem.normalize || levels.size() == 1) return;
    for (LseLevelWork& level : levels) {
      level.x.factor = vector(problem.x.rows, T(0));
      level.y.factor = problem.symmetric ? level.x.factor : vector(problem.y.rows, T(0));
    }
  }

  bool packed(const Array& a) const {
    return problem.normalize || a.dtype != type_of<T> || (a.rows > 1 && a.stride != a.cols);
  }

  // (rows, norms, whether they are to be packed), with room for `held` of them
  std::tuple<void*, void*, bool> rows_of(const Array& a, int64_t held) {
    const bool pack = packed(a);
    void* rows = pack ? allocate(held * a.cols) : a.data;
    return {rows, problem.normalize ? allocate(held) : nullptr, pack};
  }

  // Accumulates in the output itself where its type and layout allow, else in room for `held` rows.
  void* gradient(const Array& out, const Array& rows, int64_t held, const char* name) {
    if (!out.data) return nullptr;
    require(out.dtype == rows.dtype || out.dtype == type_of<T>, name, "unexpected dtype");
    check(out, name, rows.rows, rows.cols);
    const bool direct = out.dtype == type_of<T> && (out.rows <= 1 || out.stride == out.cols);
    return direct ? out.data : allocate(held * out.cols);
  }

  void gradients(const Array& dx, const Array& dy) {
    require(!problem.symmetric || !dy.data, "dy", "y = x has one gradient");
    work.dx = gradient(dx, problem.x, problem.x.rows, "dx");
    work.dy = problem.symmetric ? work.dx : gradient(dy, problem.y, work.window * problem.centers.count, "dy");
    for (LseLevelWork& level : levels) {
      if (!level.x.factor) continue;
      if (work.dx) level.x.radial = vector(problem.x.rows, T(0));
      if (work.dy) level.y.radial = problem.symmetric ? level.x.radial : vector(problem.y.rows, T(0));
    }
  }

  void parameters(LseHeadWork& h, const LseGradient& g) {
    if (g.scale.data) {
      check(g.scale, "grad_scale", 1, 1, type_of<T>);
      h.scale_rows = vector(problem.x.rows, T(0));
    }
    if (g.row_bias.data) {
      check(g.row_bias, "grad_row_bias", 1, problem.x.rows, type_of<T>);
      h.grad_row_bias = vector(problem.x.rows, T(0));
    }
    if (g.col_bias.data) {
      check(g.col_bias, "grad_column_bias", 1, problem.columns(), type_of<T>);
      h.grad_col_bias = vector(problem.columns(), T(0));
    }
  }

  void deliver(const LseHeadWork& h, const LseGradient& g) const {
    if (g.scale.data) {
      double total = 0;
      for (int64_t i = 0; i < problem.x.rows; ++i) total += double(static_cast<T*>(h.scale_rows)[i]);
      *g.scale.as<T>() = T(total);
    }
    copy_out(h.grad_row_bias, g.row_bias);
    copy_out(h.grad_col_bias, g.col_bias);
  }

  static void copy_out(const void* from, const Array& to) {
    if (to.data) std::copy(static_cast<const T*>(from), static_cast<const T*>(from) + to.cols, to.as<T>());
  }

  void results(LseHeadWork& h, const LseResult& r) {
    const int64_t n = length(problem, *h.head);
    check(r.lse, "lse", 1, n, type_of<T>);
    check(r.t, "t", 1, n, type_of<T>);
    h.peak = vector(n, -std::numeric_limits<T>::infinity());
    h.sum = vector(n, T(0));
    h.t = vector(n, T(0));
  }

  void thread_spaces() { thread_spaces(kernels().thread_elements(work.plan, work.tiles)); }

  void thread_spaces(int64_t elements) {
    work.thread_bytes = (elements * int64_t(sizeof(T)) + 63) / 64 * 64;
    work.threads = reinterpret_cast<char*>(allocate(work.thread_bytes / int64_t(sizeof(T)) * problem.threads));
  }
};

template <class T> void forward(const MaskedLseProblem& p, const std::vector<LseResult>& results) {
  Setup<T> setup(p);
  for (size_t k = 0; k < results.size(); ++k) setup.results(setup.heads[k], results[k]);
  setup.thread_spaces();
  setup.kernels().forward(setup.work);
  for (size_t k = 0; k < results.size(); ++k) {
    Setup<T>::copy_out(setup.heads[k].peak, results[k].lse);
    Setup<T>::copy_out(setup.heads[k].t, results[k].t);
  }
}

template <class T>
void backward(const MaskedLseProblem& p, const std::vector<LseUpstream>& upstream, const Array& dx, const Array& dy,
              const std::vector<LseGradient>& gradients) {
  Setup<T> setup(p);
  for (size_t k = 0; k < upstream.size(); ++k) {
    LseHeadWork& h = setup.heads[k];
    const LseUpstream& u = upstream[k];
    const int64_t n = length(p, p.heads[k]);
    check(u.lse, "lse", 1, n, type_of<T>);
    check_given(u.grad_lse, "grad_lse", n, type_of<T>);
    check_given(u.grad_t, "grad_t", n, type_of<T>);
    T *lse = setup.vector(n, T(0), u.lse), *grad = setup.vector(n, T(0), u.grad_lse);
    for (int64_t i = 0; i < n; ++i)
      if (lse[i] == -std::numeric_limits<T>::infinity()) {
        lse[i] = -lse[i];
        grad[i] = 0;
      }
    h.lse = lse;
    h.grad_lse = grad;
    h.grad_t = setup.vector(n, T(0), u.grad_t);
    setup.parameters(h, gradients[k]);
  }
  setup.gradients(dx, dy);
  setup.thread_spaces();
  setup.kernels().backward(setup.work, dx, dy);
  for (size_t k = 0; k < upstream.size(); ++k) setup.deliver(setup.heads[k], gradients[k]);
}

// S multiplied twice: a pass for lse and t, then one for the gradients.
template <class T>
void two_passes(const MaskedLseProblem& p, const Array& weight, const LseResult& result, const Array& dx,
                const Array& dy, const LseGradient& gradient) {
  forward<T>(p, {result});
  std::vector<T> minus(weight.as<T>(), weight.as<T>() + p.x.rows);
  for (T& v : minus) v = -v;
  const int64_t n = p.x.rows, bytes = n * int64_t(sizeof(T));
  backward<T>(p, {{result.lse, weight, {minus.data(), 1, n, n, type_of<T>, bytes}}}, dx, dy, {gradient});
}

// A phi has its slope before its sum is known: the pass for the gradients gives the sums as well.
template <class T>
void one_pass(const MaskedLseProblem& p, const Array& weight, const LseResult& result, const Array& dx,
              const Array& dy, const LseGradient& gradient) {
  Setup<T> setup(p);
  LseHeadWork& h = setup.heads[0];
  setup.results(h, result);
  h.lse = h.peak;  // of a head that sums a phi, not read
  T* minus = setup.vector(p.x.rows, T(0), weight);
  for (int64_t i = 0; i < p.x.rows; ++i) minus[i] = -minus[i];
  h.grad_lse = setup.vector(p.x.rows, T(0), weight);
  h.grad_t = minus;
  setup.parameters(h, gradient);
  setup.gradients(dx, dy);
  setup.thread_spaces();
  setup.kernels().backward(setup.work, dx, dy);
  setup.deliver(h, gradient);
  Setup<T>::copy_out(h.peak, result.lse);
  Setup<T>::copy_out(h.t, result.t);
}

template <class T>
void sweep(const MaskedLseProblem& p, const Array& weight, const LseResult& result, const Array& dx, const Array& dy,
           const LseGradient& gradient) {
  check(weight, "weight", 1, p.x.rows, type_of<T>);
  // Symmetric S needs half a product forward and one and a half backward.
  if (is_phi(p.heads[0].reduce)) return one_pass<T>(p, weight, result, dx, dy, gradient);
  if (p.symmetric || p.x.rows == 0) return two_passes<T>(p, weight, result, dx, dy, gradient);
  Setup<T> setup(p, true);
  LseHeadWork& h = setup.heads[0];
  setup.results(h, result);
  setup.parameters(h, gradient);
  setup.gradients(dx, dy);
  SweepPlan plan = sweep_plan(p.x.rows, p.columns(), p.x.cols, sizeof(T), p.threads, p.centers.count);
  // Targets that depend on scores need those after exponentials would have taken their place.
  const PairMask& targets = p.heads[0].target.mask;
  if (targets.above.data || targets.below.data) plan.keep = false;
  if (plan.keep) {
    const int64_t blocks = (p.columns() + plan.col_block - 1) / plan.col_block;
    setup.work.block = setup.allocate(blocks * plan.tile_elements());
  }
  setup.work.sweep = plan;
  setup.work.weight = weight.data;
  const MaskedLseSweep kernel = masked_lse_sweep_kernel(setup.kDoubles);
  setup.thread_spaces(kernel.thread_elements(setup.work));
  kernel.run(setup.work, dx, dy);
  setup.deliver(h, gradient);
  Setup<T>::copy_out(h.peak, result.lse);
  Setup<T>::copy_out(h.t, result.t);
}

template <class T> void extrema(const MaskedLseProblem& p, const std::vector<Extremum>& wanted) {
  Setup<T> setup(p);
  for (size_t k = 0; k < wanted.size(); ++k) {
    check(wanted[k].value, "value", 1, p.x.rows, type_of<T>);
    check(wanted[k].index, "index", 1, p.x.rows, DType::i64);
    LseHeadWork& h = setup.heads[k];
    h.peak = setup.vector(p.x.rows, -std::numeric_limits<T>::infinity());
    h.index = wanted[k].index.as<int64_t>();
    std::fill(h.index, h.index + p.x.rows, int64_t(-1));
  }
  setup.thread_spaces();
  setup.kernels().forward(setup.work);
  for (size_t k = 0; k < wanted.size(); ++k) {
    const T* peak = static_cast<const T*>(setup.heads[k].peak);
    const T sign = T(p.heads[k].scale);
    for (int64_t i = 0; i < p.x.rows; ++i) wanted[k].value.as<T>()[i] = sign * peak[i];
  }
}

bool doubles(const MaskedLseProblem& p) { return p.x.dtype == DType::f64; }

}  // namespace

void masked_lse_forward(const MaskedLseProblem& p, const std::vector<LseResult>& results) {
  check_problem(p);
  require(results.size() == p.heads.size(), "results", "expected one a head");
  doubles(p) ? forward<double>(p, results) : forward<float>(p, results);
}

void row_extrema(const MaskedLseProblem& without_heads, const std::vector<Extremum>& wanted) {
  MaskedLseProblem p = without_heads;
  for (const Extremum& e : wanted) {
    LseHead h;
    h.scale = e.greatest ? 1 : -1;  // least: the greatest of -s, exactly
    h.mask = e.mask;
    h.reduce = Reduction::greatest;
    p.heads.push_back(h);
  }
  check_problem(p, Reduction::greatest);
  doubles(p) ? extrema<double>(p, wanted) : extrema<float>(p, wanted);
}

void masked_lse_backward(const MaskedLseProblem& p, const std::vector<LseUpstream>& upstream, const Array& dx,
                         const Array& dy, const std::vector<LseGradient>& gradients) {
  check_problem(p);
  require(upstream.size() == p.heads.size() && gradients.size() == p.heads.size(), "upstream", "expected one a head");
  doubles(p) ? backward<double>(p, upstream, dx, dy, gradients) : backward<float>(p, upstream, dx, dy, gradients);
}

void masked_lse_sweep(const MaskedLseProblem& p, const Array& weight, const LseResult& result, const Array& dx,
                      const Array& dy, const LseGradient& gradient) {
  check_problem(p);
  require(p.heads.size() == 1 && !p.heads[0].column, "heads", "one sweep serves one head over rows");
  doubles(p) ? sweep<double>(p, weight, result, dx, dy, gradient) : sweep<float>(p, weight, result, dx, dy, gradient);
}

}  // namespace fastret
