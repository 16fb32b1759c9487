// Loss and gradients of one row head where each row's upstream gradient is known beforehand, by columns: a thread owns
// blocks of columns, their rows of dY, and what it has of every row's sums.
//
// Rows are worked in blocks. First each thread multiplies the block with its columns and has sums of exponentials
// relative to a reference of its own; these are merged into each row's lse; then dS_ij = w_i (P_ij - Y_ij) of its columns
// gives its part of dX and its rows of dY: every sum has one writer and one order. Where the exponentials of a block of
// rows fit a last-level cache they are kept and S is multiplied once, else twice (plan.h).
//
// Rows of y that are many are packed per block of columns into the thread's own memory, never all of them.
#include "centers.h"
#include "gemm.h"
#include "masked_lse.h"
#include "pack.h"
#include "pair_rows.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// A row's reference rises only when a logit exceeds it by this much: sums stay far from overflow, and what was
// computed earlier in the row hardly ever has to be scaled again.
constexpr double kSlack = 16;

// Sums over a thread's columns of one row.
template <class T> struct Sums {
  T reference, total, total_scores, target, target_scores, target_weight;
  T factor;  // after merging: what the thread's exponentials become P with, times the row's weight
};

template <class T> struct SweepSpace {
  T *y, *norms;                 // a block of columns: rows of y, packed, and their norms
  T *tile, *logits, *targets;   // scores of it, where they are not kept; one row each
  T *dx;                        // the thread's part of the block of rows
  Sums<T>* sums;                // one a row of the block
  T* gemm;

  static int64_t sums_elements(const SweepPlan& p) {
    return (p.rows * int64_t(sizeof(Sums<T>) / sizeof(T)) + 15) / 16 * 16;
  }
  static int64_t elements(const SweepPlan& p, int64_t d, int64_t y_rows, bool dx) {
    return y_rows * (d + 1) + (p.keep ? 0 : p.tile_elements()) + 2 * p.col_block + (dx ? p.rows * d : 0) +
           sums_elements(p) + kGemmWorkspace;
  }
  SweepSpace(char* memory, const SweepPlan& p, int64_t d, int64_t y_rows, bool with_dx) {
    gemm = reinterpret_cast<T*>(memory);
    sums = reinterpret_cast<Sums<T>*>(gemm + kGemmWorkspace);
    logits = gemm + kGemmWorkspace + sums_elements(p);
    targets = logits + p.col_block;
    tile = targets + p.col_block;
    dx = tile + (p.keep ? 0 : p.tile_elements());
    y = dx + (with_dx ? p.rows * d : 0);
    norms = y + y_rows * d;
  }
};

// Rows of y that a thread packs at a time; 0 where they are used where they lie.
inline int64_t packed_rows(const MaskedLseWork& w) {
  return w.pack_y && !w.y ? w.sweep.col_block * w.problem.centers.count : 0;
}

template <class T> class Sweep {
 public:
  explicit Sweep(const MaskedLseWork& w)
      : w_(w), p_(w.problem), h_(w.heads[0]), plan_(w.sweep), n_(p_.x.rows), m_(p_.columns()), d_(p_.x.cols),
        x_(static_cast<T*>(w.x)), y_(static_cast<T*>(w.y)), dx_(static_cast<T*>(w.dx)), dy_(static_cast<T*>(w.dy)),
        block_(static_cast<T*>(w.block)), y_norm_(static_cast<T*>(w.y_norm)), scale_(T(h_.head->scale)),
        chunks_((m_ + plan_.col_block - 1) / plan_.col_block), pack_y_(packed_rows(w) > 0) {}

  void run(const Array& dx, const Array& dy) {
    T poison = 0;
#pragma omp parallel num_threads(p_.threads) reduction(+ : poison)
    {
      const SerialBlas serial;
      const SweepSpace<T> space = space_of(thread_number());
      poison += place_rows(p_.x, w_.pack_x, p_.normalize, nullptr, x_, static_cast<T*>(w_.x_norm));
      if (!pack_y_) poison += place_rows(p_.y, w_.pack_y, p_.normalize, nullptr, y_, y_norm_);
      for (int64_t first = 0; first < n_; first += plan_.rows) {
        const Rows block{first, std::min(plan_.rows, n_ - first)};
        poison += reduce(block, space);
        merge(block, team_size());
        if (dx_ || dy_ || h_.grad_col_bias) {
          differentiate(block, space, dy);
          if (dx_) deliver_block(block, dx, team_size());
        }
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      static_cast<T*>(h_.peak)[i] += poison;
      static_cast<T*>(h_.t)[i] += poison;
    }
  }

 private:
  struct Rows {
    int64_t first, count;
  };

  SweepSpace<T> space_of(int thread) const {
    return {w_.threads + thread * w_.thread_bytes, plan_, d_, packed_rows(w_), dx_ != nullptr};
  }
  int64_t cols(int64_t c) const { return std::min(plan_.col_block, m_ - c * plan_.col_block); }
  Span span(int64_t i, int64_t c) const { return {i, c * plan_.col_block, cols(c), p_.first_column}; }
  T* tile(int64_t c, const SweepSpace<T>& space) const {
    return plan_.keep ? block_ + c * plan_.tile_elements() : space.tile;
  }
  // Of a block of columns with centres: they follow its scores.
  CenterTile<T> center_tile(const Rows& block, int64_t c, const SweepSpace<T>& space) const {
    const int64_t plane = plan_.rows * plan_.col_block;
    return {tile(c, space) + plane, block.count, cols(c), plan_.col_block, plane};
  }
  // Rows of y that belong to a block of columns.
  int64_t first_row(int64_t c) const { return c * plan_.col_block * p_.centers.count; }
  int64_t end_row(int64_t c) const { return first_row(c) + cols(c) * p_.centers.count; }

  // Unit rows of y of a block of columns; packed where not all are. Returns the poison of those that are.
  const T* columns(int64_t c, const SweepSpace<T>& space, T& poison) const {
    const int64_t begin = first_row(c);
    if (!pack_y_) return y_ + begin * d_;
    poison += pack_rows(p_.y, nullptr, p_.normalize, begin, end_row(c), space.y - begin * d_, space.norms - begin);
    return space.y;
  }

  void multiply(const Rows& block, int64_t c, const T* y, const SweepSpace<T>& space) const {
    T* scores = tile(c, space);
    if (p_.centers.count > 1) {
      const CenterTile<T> products = center_tile(block, c, space);
      multiply_centers(p_.centers, products, d_, x_ + block.first * d_, y, space.gemm);
      reduce_centers(p_.centers, products, scores, true);
    } else {
      gemm(Op::none, Op::transpose, block.count, cols(c), d_, x_ + block.first * d_, d_, y, d_, false, scores,
           plan_.col_block, space.gemm);
    }
    for (int64_t r = 0; r < block.count; ++r)
      std::fill(scores + r * plan_.col_block + cols(c), scores + r * plan_.col_block + padded<T>(cols(c)), T(0));
  }

  // Every thread's sums over its own columns.
  T reduce(const Rows& block, const SweepSpace<T>& space) const {
    T poison = 0;
    int64_t own = -1;  // first block of columns of this thread
    for (int64_t r = 0; r < block.count; ++r) space.sums[r] = {kNothing<T>, 0, 0, 0, 0, 0, 0};
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks_; ++c) {
      if (own < 0) own = c;
      multiply(block, c, columns(c, space, poison), space);
      for (int64_t r = 0; r < block.count; ++r) exponentiate(block.first + r, r, c, own, space);
    }
    return poison;
  }

  // Scores of one row and block of columns become exponentials.
  void exponentiate(int64_t i, int64_t r, int64_t c, int64_t own, const SweepSpace<T>& space) const {
    const Span at = span(i, c);
    Sums<T>& sums = space.sums[r];
    T *scores = tile(c, space) + r * plan_.col_block, *logits = space.logits;
    logits_of(h_, at, scores, logits);
    const PairTarget& target = h_.head->target;
    visit_targets<T>(target, at, [&](int64_t j, double weight) {
      sums.target += T(weight) * logits[j];
      sums.target_scores += T(weight) * scores[j];
      sums.target_weight += T(weight);
    });
    if (is_dense(target)) {
      dense_targets(target, at, scores, space.targets);
      sums.target += dot(space.targets, logits, at.cols);
      sums.target_scores += dot(space.targets, scores, at.cols);
      for (int64_t j = 0; j < at.cols; ++j) sums.target_weight += space.targets[j];
    }
    mask_logits(h_.head->mask, at, scores, logits);
    if (const T high = largest(logits, at.cols); high > sums.reference + T(kSlack)) raise(r, c, own, high, sums);
    const T base = sums.reference == kNothing<T> ? T(0) : sums.reference;
    Vec<T> total{}, total_scores{};
    for (int64_t j = 0; j < padded<T>(at.cols); j += lanes<T>) {
      const Vec<T> e = exp_or_zero<T>(load<T>(logits + j) - base);
      total += e;
      total_scores += e * load<T>(scores + j);
      store<T>(scores + j, e);
    }
    sums.total += sum<T>(total);
    sums.total_scores += sum<T>(total_scores);
  }

  void raise(int64_t r, int64_t c, int64_t own, T high, Sums<T>& sums) const {
    const T shrink = std::exp(sums.reference - high);
    sums.reference = high;
    sums.total *= shrink;
    sums.total_scores *= shrink;
    if (!plan_.keep) return;
    for (int64_t before = own; before < c; ++before) {
      T* kept = block_ + before * plan_.tile_elements() + r * plan_.col_block;
      for (int64_t j = 0; j < plan_.col_block; ++j) kept[j] *= shrink;
    }
  }

  // Each row's lse and t, and the factors of the threads' exponentials.
  void merge(const Rows& block, int team) const {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t i = block.first + r;
      Sums<T> all{kNothing<T>, 0, 0, 0, 0, 0, 0};
      for (int k = 0; k < team; ++k) all.reference = std::max(all.reference, space_of(k).sums[r].reference);
      for (int k = 0; k < team; ++k) {
        Sums<T>& part = space_of(k).sums[r];
        part.factor = part.reference == all.reference ? T(1) : std::exp(part.reference - all.reference);
        all.total += part.total * part.factor;
        all.total_scores += part.total_scores * part.factor;
        all.target += part.target;
        all.target_scores += part.target_scores;
        all.target_weight += part.target_weight;
      }
      const bool nothing = all.total == T(0);  // no pair is allowed: only the target pulls
      const bool overflows = all.reference == -kNothing<T>;  // of such a row P is NaN where logits are inf, 0 elsewhere
      const T total = nothing || overflows ? T(1) : all.total, weight = static_cast<const T*>(w_.weight)[i];
      for (int k = 0; k < team; ++k) space_of(k).sums[r].factor *= weight / total;
      static_cast<T*>(h_.peak)[i] = all.reference + std::log(overflows ? total : all.total);
      static_cast<T*>(h_.t)[i] = all.target;
      if (h_.scale_rows) static_cast<T*>(h_.scale_rows)[i] = weight * (all.total_scores / total - all.target_scores);
      if (h_.grad_row_bias) static_cast<T*>(h_.grad_row_bias)[i] = weight * (all.total / total - all.target_weight);
    }
  }

  // dS (without the scale) of a thread's columns times rows: its part of dX, and its rows of dY.
  void differentiate(const Rows& block, const SweepSpace<T>& space, const Array& dy) const {
    const bool last = block.first + block.count == n_;
    T ignored = 0;
    if (dx_) std::fill(space.dx, space.dx + block.count * d_, T(0));
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks_; ++c) {
      const int64_t begin = first_row(c);
      const T* y = columns(c, space, ignored);
      if (!plan_.keep) multiply(block, c, y, space);
      T* weights = tile(c, space);
      for (int64_t r = 0; r < block.count; ++r) weigh(block.first + r, r, c, weights + r * plan_.col_block, space);
      if (T* out = static_cast<T*>(h_.grad_col_bias)) {
        out += c * plan_.col_block;
        for (int64_t r = 0; r < block.count; ++r)
          for (int64_t j = 0; j < cols(c); ++j) out[j] += weights[r * plan_.col_block + j];
      }
      T *dx = dx_ ? space.dx : nullptr, *dy_rows = dy_ ? dy_ + begin * d_ : nullptr;
      const T* x = x_ + block.first * d_;
      const bool add = block.first > 0;
      if (p_.centers.count > 1) {
        differentiate_centers(p_.centers, center_tile(block, c, space), weights, d_, x, y, dx, dy_rows, add,
                              space.gemm);
      } else {
        if (dx)
          gemm(Op::none, Op::none, block.count, d_, cols(c), weights, plan_.col_block, y, d_, true, dx, d_, space.gemm);
        if (dy_rows)
          gemm(Op::transpose, Op::none, cols(c), d_, block.count, weights, plan_.col_block, x, d_, add, dy_rows, d_,
               space.gemm);
      }
      if (!dy_ || !last) continue;
      for (int64_t k = begin * d_; k < end_row(c) * d_; ++k) dy_[k] *= scale_;
      deliver_rows(dy, dy_, y - begin * d_, pack_y_ ? space.norms - begin : y_norm_, p_.normalize, begin, end_row(c));
    }
  }

  // Exponentials, or where they were not kept scores, of one row and block of columns become w (P - Y).
  void weigh(int64_t i, int64_t r, int64_t c, T* row, const SweepSpace<T>& space) const {
    const Span at = span(i, c);
    const PairTarget& target = h_.head->target;
    const T weight = static_cast<const T*>(w_.weight)[i], factor = space.sums[r].factor;
    if (is_dense(target)) dense_targets(target, at, row, space.targets);
    if (plan_.keep) {
      for (int64_t j = 0; j < padded<T>(at.cols); j += lanes<T>) store<T>(row + j, load<T>(row + j) * factor);
    } else {
      const T reference = space.sums[r].reference, base = reference == kNothing<T> ? T(0) : reference;
      logits_of(h_, at, row, space.logits);
      mask_logits(h_.head->mask, at, row, space.logits);
      for (int64_t j = 0; j < padded<T>(at.cols); j += lanes<T>)
        store<T>(row + j, exp_or_zero<T>(load<T>(space.logits + j) - base) * factor);
    }
    visit_targets<T>(target, at, [&](int64_t j, double y) { row[j] -= weight * T(y); });
    if (is_dense(target))
      for (int64_t j = 0; j < at.cols; ++j) row[j] -= weight * space.targets[j];
  }

  void deliver_block(const Rows& block, const Array& dx, int team) const {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t i = block.first + r;
      T* out = dx_ + i * d_;
      std::fill(out, out + d_, T(0));
      for (int k = 0; k < team; ++k) {
        const T* part = space_of(k).dx + r * d_;
        for (int64_t f = 0; f < d_; ++f) out[f] += part[f];
      }
      for (int64_t f = 0; f < d_; ++f) out[f] *= scale_;
      deliver_rows(dx, dx_, x_, static_cast<T*>(w_.x_norm), p_.normalize, i, i + 1);
    }
  }

  const MaskedLseWork& w_;
  const MaskedLseProblem& p_;
  const LseHeadWork& h_;
  const SweepPlan plan_;
  const int64_t n_, m_, d_;
  T *x_, *y_, *dx_, *dy_, *block_, *y_norm_;
  const T scale_;
  const int64_t chunks_;
  const bool pack_y_;
};

template <class T> void sweep(const MaskedLseWork& w, const Array& dx, const Array& dy) { Sweep<T>(w).run(dx, dy); }
template <class T> int64_t sweep_elements(const MaskedLseWork& w) {
  return SweepSpace<T>::elements(w.sweep, w.problem.x.cols, packed_rows(w), w.dx);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
MaskedLseSweep masked_lse_sweep_kernel(bool doubles) {
  return doubles ? MaskedLseSweep{sweep_elements<double>, sweep<double>}
                 : MaskedLseSweep{sweep_elements<float>, sweep<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
