// masked_lse by tiles: forward keeps a running maximum and sum per row (and per column, for heads over columns), or
// the sum of a phi, or the greatest logit;
// backward multiplies the same tiles again and turns scores into dL/dS in place, for all heads at once.
//
// Where y is x, S is symmetric: only block pairs I > J are multiplied. The tile holds the pairs (I, J) and, transposed,
// (J, I); backward adds both and needs dX_I += W X_J, dX_J += W^T X_I: half a product forward, one and a half backward.
// Levels of features (levels.h) take turns in a tile: each adds its features to the product, and has a tile of its own.
// Two tiles that are worked at once share no rows and no columns (plan.h), so that every sum has one writer.
#include "masked_lse.h"

#include "both_axes.h"
#include "centers.h"
#include "gemm.h"
#include "levels.h"
#include "pack.h"
#include "pair_rows.h"
#include "phi.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

template <class T> struct ThreadSpace {
  T *tile, *turned;          // products of a tile, and its scores' transpose
  T* levels;                 // scores of each of several levels; those of one are its products; products of centres
  T *logits, *a, *b, *c;     // one row, or one column
  T* gemm;
  static int64_t row_elements(const Plan& p) { return std::max(p.row_block, p.col_block); }
  static int64_t elements(const Plan& p, int64_t tiles) {
    return tiles * p.row_block * p.col_block + 4 * row_elements(p) + kGemmWorkspace;
  }
  ThreadSpace(const MaskedLseWork& w, int thread) {
    const int64_t size = w.plan.row_block * w.plan.col_block;
    tile = reinterpret_cast<T*>(w.threads + thread * w.thread_bytes);
    turned = tile + size;
    levels = turned + size;
    gemm = tile + w.tiles * size;
    logits = gemm + kGemmWorkspace;
    a = logits + row_elements(w.plan);
    b = a + row_elements(w.plan);
    c = b + row_elements(w.plan);
  }
};

template <class T> class MaskedLse {
 public:
  explicit MaskedLse(const MaskedLseWork& w)
      : w_(w), p_(w.problem), n_(p_.x.rows), m_(p_.columns()), d_(p_.x.cols), x_(static_cast<T*>(w.x)),
        y_(static_cast<T*>(w.y)), dx_(static_cast<T*>(w.dx)), dy_(static_cast<T*>(w.dy)) {}

  void forward() {
    T poison = 0;
#pragma omp parallel num_threads(p_.threads) reduction(+ : poison)
    {
      const SerialBlas serial;
      const ThreadSpace<T> space(w_, thread_number());
      poison += pack_x();
      for_windows([&](const Columns& c) {
        poison += pack_y(c);
        for_tiles_of(c, [&](const Tile& t) {
          for (int64_t k = 0; k < w_.level_count; ++k) {
            T* scores = score_tile(t, c, k, space, false);
            for_sides(t, k, scores, space, [&](const Side& side) { reduce_side(side, space); });
          }
        });
      });
    }
    for (int64_t k = 0; k < w_.head_count; ++k) finish(w_.heads[k], poison);
  }

  void backward(const Array& dx_out, const Array& dy_out) {
#pragma omp parallel num_threads(p_.threads)
    {
      const SerialBlas serial;
      const ThreadSpace<T> space(w_, thread_number());
      pack_x();
      clear(dx_, n_ * d_);
      for_windows([&](const Columns& c) {
        pack_y(c);
        T* dy = dy_ && dy_ != dy_out.data ? dy_ - row_of(c.begin) * d_ : dy_;
        if (dy && !p_.symmetric) clear(dy + row_of(c.begin) * d_, row_of(c.end - c.begin) * d_);
        for_tiles_of(c, [&](const Tile& t) { gradient_tile(t, c, dy, space); });
        if (!p_.symmetric)
          deliver(dy_out, dy, c.y, c.norms, row_of(c.begin), row_of(c.end), &LseLevelWork::y);
      });
      deliver(dx_out, dx_, x_, static_cast<T*>(w_.x_norm), 0, n_, &LseLevelWork::x);
    }
    for (int64_t k = 0; k < w_.head_count; ++k)
      if (w_.heads[k].sum) finish(w_.heads[k], T(0));
  }

 private:
  // A tile, or the transpose of one; and whose it is.
  struct Side : ScoreTile<T> {
    const LseLevelWork& level;
    Side(const LseLevelWork& level, const ScoreTile<T>& tile) : ScoreTile<T>(tile), level(level) {}
  };

  // Columns [begin, end), whose rows of y are packed at a time. Pointers count from the first of all columns.
  struct Columns {
    int64_t begin, end;
    T *y, *norms;
  };

  // Windows end where blocks of columns do: tiles, and so scores, are the same whatever the window.
  template <class Visit> void for_windows(Visit visit) const {
    T* norms = static_cast<T*>(w_.y_norm);
    for (int64_t begin = 0; begin < m_; begin += w_.window)
      visit(Columns{begin, std::min(m_, begin + w_.window), y_ - row_of(begin) * d_,
                    norms ? norms - row_of(begin) : nullptr});
  }

  template <class Visit> void for_tiles_of(const Columns& c, Visit visit) const {
    for_tiles(n_, c.end - c.begin, w_.plan, p_.symmetric, [&](Tile t) {
      t.col += c.begin;
      t.col_end += c.begin;
      visit(t);
    });
  }

  T pack_x() const {
    T* norms = static_cast<T*>(w_.x_norm);
    const T poison = place_rows(p_.x, w_.pack_x, p_.normalize, nullptr, x_, norms);
    for (int64_t k = 0; k < w_.level_count; ++k)
      level_factors(x_, norms, 0, n_, d_, w_.levels[k].end, w_.levels[k].x);
    return poison;
  }

  T pack_y(const Columns& c) const {
    if (p_.symmetric) return 0;
    const T poison =
        place_rows(p_.y, w_.pack_y, p_.normalize, nullptr, row_of(c.begin), row_of(c.end), c.y, c.norms);
    for (int64_t k = 0; k < w_.level_count; ++k)
      level_factors(c.y, c.norms, c.begin, c.end, d_, w_.levels[k].end, w_.levels[k].y);
    return poison;
  }

  CenterTile<T> center_tile(const Tile& t, const ThreadSpace<T>& space) const {
    return {space.levels, t.rows(), t.cols(), w_.plan.col_block, w_.plan.row_block * w_.plan.col_block};
  }
  // The first of the rows of y that are this column's.
  int64_t row_of(int64_t column) const { return column * p_.centers.count; }

  T* level_tile(int64_t k, const ThreadSpace<T>& space) const {
    return w_.level_count == 1 ? space.tile : space.levels + k * w_.plan.row_block * w_.plan.col_block;
  }

  // Scores of a level: its features join the product of those before it. Rows are padded by zeros.
  T* score_tile(const Tile& t, const Columns& c, int64_t k, const ThreadSpace<T>& space, bool slopes) const {
    if (p_.centers.count > 1) {
      const CenterTile<T> products = center_tile(t, space);
      multiply_centers(p_.centers, products, d_, x_ + t.row * d_, c.y + row_of(t.col) * d_, space.gemm);
      reduce_centers(p_.centers, products, space.tile, slopes);
      pad(space.tile, w_.plan.col_block, t.rows(), t.cols());
      return space.tile;
    }
    const LseLevelWork& level = w_.levels[k];
    const int64_t begin = level.begin, stride = w_.plan.col_block;
    T* scores = level_tile(k, space);
    gemm(Op::none, Op::transpose, t.rows(), t.cols(), level.end - begin, x_ + t.row * d_ + begin, d_,
         c.y + t.col * d_ + begin, d_, k > 0, space.tile, stride, space.gemm);
    pad(space.tile, stride, t.rows(), t.cols());
    if (scores != space.tile) scale_products(t, level, space.tile, stride, scores);
    if (!t.two_sided) return scores;
    transpose<false>(scores, stride, t.rows(), t.cols(), space.turned, w_.plan.row_block);
    pad(space.turned, w_.plan.row_block, t.cols(), t.rows());
    return scores;
  }

  static void pad(T* tile, int64_t stride, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r) std::fill(tile + r * stride + cols, tile + r * stride + padded<T>(cols), T(0));
  }

  template <class Visit>
  void for_sides(const Tile& t, int64_t k, T* scores, const ThreadSpace<T>& space, Visit visit) const {
    const LseLevelWork& level = w_.levels[k];
    visit(Side(level, {scores, w_.plan.col_block, t.row, t.rows(), t.col, t.cols()}));
    if (t.two_sided) visit(Side(level, {space.turned, w_.plan.row_block, t.col, t.cols(), t.row, t.rows()}));
  }

  // Whether the level's heads are one over rows and one over columns that a pair's one exponential serves.
  bool has_both_axes(const LseLevelWork& level) const {
    return level.head_end == level.head + 2 && share_logits(*w_.heads[level.head].head, *w_.heads[level.head + 1].head);
  }

  void reduce_side(const Side& side, const ThreadSpace<T>& space) const {
    const LseHeadWork* heads = w_.heads + side.level.head;
    if (has_both_axes(side.level) &&
        reduce_both<T>(heads[0], heads[1], side, p_.first_column, {space.a, space.b, space.c, space.logits}))
      return;
    for (int64_t k = side.level.head; k < side.level.head_end; ++k) {
      const LseHeadWork& h = w_.heads[k];
      const Reduction kind = h.head->reduce;
      T* top = h.head->column && kind == Reduction::lse ? space.b : nullptr;
      if (top) std::fill(top, top + padded<T>(side.cols), kNothing<T>);
      for (int64_t r = 0; r < side.rows; ++r) {
        const Span at = side.span(r, p_.first_column);
        logits_of(h, at, side.at(r), space.logits);
        add_targets(h, at, side.at(r), space);
        if (is_phi(kind)) {
          add_phi(h, at, side.at(r), space.logits);
          continue;
        }
        mask_logits(h.head->mask, at, side.at(r), space.logits);
        if (top) raise(space.logits, side.cols, top);
        else if (kind == Reduction::greatest) keep_greatest(h, at, space.logits);
        else reduce_row(h, at, space.logits);
      }
      if (top) reduce_columns(h, side, space);
    }
  }

  void add_targets(const LseHeadWork& h, const Span& at, const T* scores, const ThreadSpace<T>& space) const {
    T* t = static_cast<T*>(h.t);
    const bool column = h.head->column;
    visit_targets<T>(h.head->target, at, [&](int64_t j, double weight) {
      t[column ? at.col + j : at.i] += T(weight) * space.logits[j];
    });
    if (!is_dense(h.head->target)) return;
    dense_targets(h.head->target, at, scores, space.a);
    Vec<T> total{};
    for (int64_t j = 0; j < at.cols; j += lanes<T>) {
      const Vec<T> part = load<T>(space.a + j) * load<T>(space.logits + j);
      if (column) store<T>(t + at.col + j, load<T>(t + at.col + j) + part);
      total += part;
    }
    if (!column) t[at.i] += sum<T>(total);
  }

  // A masked pair adds nothing whatever its logit: phi may have no number there.
  void add_phi(const LseHeadWork& h, const Span& at, const T* scores, T* logits) const {
    T* total = static_cast<T*>(h.sum);
    phi_values(h.head->reduce, at.cols, logits);
    mask_logits(h.head->mask, at, scores, logits, T(0));
    if (h.head->column) {
      for (int64_t j = 0; j < at.cols; j += lanes<T>)
        store<T>(total + at.col + j, load<T>(total + at.col + j) + load<T>(logits + j));
      return;
    }
    Vec<T> part{};
    for (int64_t j = 0; j < at.cols; j += lanes<T>) part += load<T>(logits + j);
    total[at.i] += sum<T>(part);
  }

  // Tiles come in any order of columns: of equals the lowest column stays.
  void keep_greatest(const LseHeadWork& h, const Span& at, const T* logits) const {
    T& peak = static_cast<T*>(h.peak)[at.i];
    const T high = largest(logits, at.cols);
    const int64_t first = at.first_column + at.col;
    if (!(high > peak || (high == peak && first < h.index[at.i]))) return;
    int64_t j = 0;
    while (logits[j] != high) ++j;
    peak = high;
    h.index[at.i] = first + j;
  }

  void reduce_row(const LseHeadWork& h, const Span& at, const T* logits) const {
    T &peak = static_cast<T*>(h.peak)[at.i], &total = static_cast<T*>(h.sum)[at.i];
    const T high = largest(logits, at.cols);
    if (high > peak) {
      total *= std::exp(peak - high);
      peak = high;
    }
    // nothing yet: -inf - 0 stays -inf; a logit that overflowed has a finite exponential; and NaN shows in both
    const T base = std::isinf(peak) ? T(0) : peak;
    Vec<T> part{};
    for (int64_t j = 0; j < at.cols; j += lanes<T>) part += exp_or_zero<T>(load<T>(logits + j) - base);
    total += sum<T>(part);
  }

  static void raise(const T* logits, int64_t cols, T* top) {
    for (int64_t j = 0; j < cols; j += lanes<T>) {
      const Vec<T> v = load<T>(logits + j), old = load<T>(top + j);
      store<T>(top + j, v > old ? v : old);
    }
  }

  // space.b: the largest logit of each of the side's columns
  void reduce_columns(const LseHeadWork& h, const Side& side, const ThreadSpace<T>& space) const {
    T *peak = static_cast<T*>(h.peak) + side.col, *total = static_cast<T*>(h.sum) + side.col, *base = space.b;
    for (int64_t j = 0; j < side.cols; j += lanes<T>) {
      const Vec<T> high = load<T>(base + j), old = load<T>(peak + j), now = high > old ? high : old;
      const Vec<T> safe = now == splat(kNothing<T>) || now == splat(-kNothing<T>) ? Vec<T>{} : now;
      store<T>(total + j, load<T>(total + j) * exp_or_zero<T>(old - safe));
      store<T>(peak + j, now);
      store<T>(base + j, safe);
    }
    for (int64_t r = 0; r < side.rows; ++r) {
      const Span at = side.span(r, p_.first_column);
      logits_of(h, at, side.at(r), space.logits);
      mask_logits(h.head->mask, at, side.at(r), space.logits);
      for (int64_t j = 0; j < side.cols; j += lanes<T>)
        store<T>(total + j, load<T>(total + j) + exp_or_zero<T>(load<T>(space.logits + j) - load<T>(base + j)));
    }
  }

  void finish(const LseHeadWork& h, T poison) const {
    T *peak = static_cast<T*>(h.peak), *t = static_cast<T*>(h.t);
    const T* total = static_cast<const T*>(h.sum);
    const Reduction kind = h.head->reduce;
    if (kind == Reduction::greatest) {
      for (int64_t i = 0; i < n_; ++i) peak[i] += poison;
      return;
    }
    for (int64_t i = 0; i < (h.head->column ? m_ : n_); ++i) {
      peak[i] = (kind == Reduction::lse ? peak[i] + std::log(total[i]) : total[i]) + poison;
      t[i] += poison;
    }
  }

  void gradient_tile(const Tile& t, const Columns& c, T* dy, const ThreadSpace<T>& space) const {
    const int64_t stride = w_.plan.col_block, last = w_.level_count - 1;
    for (int64_t k = 0; k <= last; ++k) {
      T* scores = score_tile(t, c, k, space, true);
      for_sides(t, k, scores, space, [&](const Side& side) { weigh_side(side, space); });
      if (t.two_sided) transpose<true>(space.turned, w_.plan.row_block, t.cols(), t.rows(), scores, stride);
      slopes_of_products(t, w_.levels[k], space.tile, stride, scores);
    }
    if (p_.centers.count > 1) {
      T *dx = dx_ ? dx_ + t.row * d_ : nullptr, *dy_rows = dy ? dy + row_of(t.col) * d_ : nullptr;
      return differentiate_centers(p_.centers, center_tile(t, space), space.tile, d_, x_ + t.row * d_,
                                   c.y + row_of(t.col) * d_, dx, dy_rows, true, space.gemm);
    }
    for (int64_t k = last; k >= 0; --k) {
      const int64_t begin = w_.levels[k].begin, width = w_.levels[k].end - begin;
      T* slopes = level_tile(k, space);
      if (k < last) add_slopes(t, level_tile(k + 1, space), stride, slopes);
      if (dx_)
        gemm(Op::none, Op::none, t.rows(), width, t.cols(), slopes, stride, c.y + t.col * d_ + begin, d_, true,
             dx_ + t.row * d_ + begin, d_, space.gemm);
      if (dy)
        gemm(Op::transpose, Op::none, t.cols(), width, t.rows(), slopes, stride, x_ + t.row * d_ + begin, d_, true,
             dy + t.col * d_ + begin, d_, space.gemm);
    }
  }

  void weigh_side(const Side& side, const ThreadSpace<T>& space) const {
    const LseHeadWork* heads = w_.heads + side.level.head;
    if (has_both_axes(side.level) &&
        weigh_both<T>(heads[0], heads[1], side, p_.first_column, space.a, space.b, space.c))
      return;
    for (int64_t r = 0; r < side.rows; ++r)
      weigh_row(side.level, side.span(r, p_.first_column), side.at(r), space);
  }

  // A row of a level's scores becomes the row of dL/dS, summed over its heads.
  void weigh_row(const LseLevelWork& level, const Span& at, T* scores, const ThreadSpace<T>& space) const {
    T *weights = space.logits, *total = space.b;
    for (int64_t k = level.head; k < level.head_end; ++k) {
      const LseHeadWork& h = w_.heads[k];
      const bool first = k == level.head;
      weigh(h, at, scores, weights, space);
      const T scale = T(h.head->scale);
      for (int64_t j = 0; j < at.cols; j += lanes<T>) {
        const Vec<T> v = load<T>(weights + j) * scale;
        store<T>(total + j, first ? v : load<T>(total + j) + v);
      }
      add_parameters(h, at, scores, weights);
    }
    std::copy(total, total + padded<T>(at.cols), scores);
  }

  // In one pass for values and gradients: what forward adds of a row whose logits are space.logits.
  void add_sums(const LseHeadWork& h, const Span& at, const T* scores, const ThreadSpace<T>& space) const {
    add_targets(h, at, scores, space);
    std::copy(space.logits, space.logits + padded<T>(at.cols), space.c);
    add_phi(h, at, scores, space.c);
  }

  // dL/dl of one head, where its logits were
  void weigh(const LseHeadWork& h, const Span& at, const T* scores, T* weights, const ThreadSpace<T>& space) const {
    const bool column = h.head->column;
    const int64_t place = column ? at.col : at.i;
    const T *lse = static_cast<const T*>(h.lse) + place, *grad = static_cast<const T*>(h.grad_lse) + place,
            *grad_t = static_cast<const T*>(h.grad_t) + place;
    logits_of(h, at, scores, weights);
    if (is_phi(h.head->reduce)) {
      if (h.sum) add_sums(h, at, scores, space);
      phi_slopes(h.head->reduce, at.cols, weights);
      for (int64_t j = 0; j < at.cols; j += lanes<T>)
        store<T>(weights + j, load<T>(weights + j) * (column ? load<T>(grad + j) : splat(*grad)));
      mask_logits(h.head->mask, at, scores, weights, T(0));
    } else if (column) {
      mask_logits(h.head->mask, at, scores, weights);
      for (int64_t j = 0; j < at.cols; j += lanes<T>)
        store<T>(weights + j, exp_or_zero<T>(load<T>(weights + j) - load<T>(lse + j)) * load<T>(grad + j));
    } else {
      mask_logits(h.head->mask, at, scores, weights);
      for (int64_t j = 0; j < at.cols; j += lanes<T>)
        store<T>(weights + j, exp_or_zero<T>(load<T>(weights + j) - *lse) * *grad);
    }
    visit_targets<T>(h.head->target, at,
                  [&](int64_t j, double weight) { weights[j] += T(weight) * grad_t[column ? j : 0]; });
    if (!is_dense(h.head->target)) return;
    T* targets = space.a;
    dense_targets(h.head->target, at, scores, targets);
    for (int64_t j = 0; j < at.cols; j += lanes<T>) {
      const Vec<T> g = column ? load<T>(grad_t + j) : splat(*grad_t);
      store<T>(weights + j, load<T>(weights + j) + g * load<T>(targets + j));
    }
  }

  void add_parameters(const LseHeadWork& h, const Span& at, const T* scores, const T* weights) const {
    if (h.scale_rows) {
      Vec<T> total{};
      for (int64_t j = 0; j < at.cols; j += lanes<T>) total += load<T>(weights + j) * load<T>(scores + j);
      static_cast<T*>(h.scale_rows)[at.i] += sum<T>(total);
    }
    if (h.grad_row_bias) {
      Vec<T> total{};
      for (int64_t j = 0; j < at.cols; j += lanes<T>) total += load<T>(weights + j);
      static_cast<T*>(h.grad_row_bias)[at.i] += sum<T>(total);
    }
    if (T* out = static_cast<T*>(h.grad_col_bias)) {
      out += at.col;
      for (int64_t j = 0; j < at.cols; j += lanes<T>) store<T>(out + j, load<T>(out + j) + load<T>(weights + j));
    }
  }

  void deliver(const Array& out, T* du, const T* u, const T* norms, int64_t begin, int64_t end,
               LseLevelWork::Side LseLevelWork::*side) const {
    if (!du) return;
    const bool by_prefix = p_.normalize && w_.level_count > 1;
#pragma omp for schedule(static)
    for (int64_t p = begin; p < end; ++p) {
      if (by_prefix) project_prefixes(du + p * d_, u + p * d_, norms[p], p, w_.levels, w_.level_count, side);
      deliver_rows(out, du, u, norms, p_.normalize && !by_prefix, p, p + 1);
    }
  }

  const MaskedLseWork& w_;
  const MaskedLseProblem& p_;
  const int64_t n_, m_, d_;
  T *x_, *y_, *dx_, *dy_;
};

template <class T> int64_t thread_elements(const Plan& plan, int64_t tiles) {
  return ThreadSpace<T>::elements(plan, tiles);
}
template <class T> void forward(const MaskedLseWork& w) { MaskedLse<T>(w).forward(); }
template <class T> void backward(const MaskedLseWork& w, const Array& dx, const Array& dy) {
  MaskedLse<T>(w).backward(dx, dy);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
MaskedLseKernels masked_lse_kernels(bool doubles) {
  return doubles ? MaskedLseKernels{thread_elements<double>, forward<double>, backward<double>}
                 : MaskedLseKernels{thread_elements<float>, forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
