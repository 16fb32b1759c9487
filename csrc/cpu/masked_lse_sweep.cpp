// Loss and gradients of one row head from one product of S, where each row's upstream gradient is known beforehand.
//
// A block of rows is kept whole, laid out by blocks of columns: each thread multiplies the scores of its pieces of
// rows, turns them into exponentials E relative to a reference of the row's own, and has dX = f (E - total Y) Y_rows,
// f = weight / total. Then each thread owns blocks of columns and adds E^T (f X) to its rows of dY: one writer each.
#include "gemm.h"
#include "masked_lse.h"
#include "pack.h"
#include "pair_rows.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// A row's reference rises only when a logit exceeds it by this much: sums stay far from overflow, and what was
// computed earlier in the row hardly ever has to be scaled again.
constexpr double kSlack = 16;

template <class T> class Sweep {
 public:
  explicit Sweep(const MaskedLseWork& w)
      : w_(w), p_(w.problem), h_(w.heads[0]), plan_(w.sweep), n_(p_.x.rows), m_(p_.y.rows), d_(p_.x.cols),
        x_(static_cast<T*>(w.x)), y_(static_cast<T*>(w.y)), dx_(static_cast<T*>(w.dx)), dy_(static_cast<T*>(w.dy)),
        block_(static_cast<T*>(w.block)), scaled_(static_cast<T*>(w.scaled)), factor_(scaled_ + w.sweep.rows * d_),
        scale_(T(h_.head->scale)), chunks_((m_ + w.sweep.col_block - 1) / w.sweep.col_block) {}

  void run(const Array& dx, const Array& dy) {
    T poison = 0;
#pragma omp parallel num_threads(p_.threads) reduction(+ : poison)
    {
      const SerialBlas serial;
      T* space = reinterpret_cast<T*>(w_.threads + thread_number() * w_.thread_bytes);
      const Row row{space, space + plan_.col_block, space + 2 * plan_.col_block};
      poison += place_rows(p_.x, w_.pack_x, p_.normalize, nullptr, x_, static_cast<T*>(w_.x_norm));
      poison += place_rows(p_.y, w_.pack_y, p_.normalize, nullptr, y_, static_cast<T*>(w_.y_norm));
      clear(dy_, m_ * d_);
      for (int64_t first = 0; first < n_; first += plan_.rows) {
        const int64_t rows = std::min(plan_.rows, n_ - first), pieces = (rows + plan_.piece - 1) / plan_.piece;
#pragma omp for schedule(static, 1)
        for (int64_t k = 0; k < pieces; ++k) {
          const int64_t begin = k * plan_.piece, end = std::min(rows, begin + plan_.piece);
          work_rows(first, begin, end, row, dx);
        }
#pragma omp for schedule(static, 1)
        for (int64_t c = 0; c < chunks_; ++c) work_columns(rows, c, row);
      }
      if (dy_) {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < m_; ++j)
          deliver_rows(dy, dy_, y_, static_cast<T*>(w_.y_norm), p_.normalize, j, j + 1);
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      static_cast<T*>(h_.peak)[i] += poison;
      static_cast<T*>(h_.t)[i] += poison;
    }
  }

 private:
  struct Row {
    T *logits, *targets, *gemm;
  };
  // Sums over the columns of one row.
  struct Sums {
    T reference, total, total_scores, target, target_scores, target_weight;
  };

  int64_t cols(int64_t c) const { return std::min(plan_.col_block, m_ - c * plan_.col_block); }
  T* at(int64_t c, int64_t r) const { return block_ + (c * plan_.rows + r) * plan_.col_block; }
  Span span(int64_t i, int64_t c) const { return {i, c * plan_.col_block, cols(c), p_.first_column}; }

  // Rows [begin, end) of the block whose first row is `first`.
  void work_rows(int64_t first, int64_t begin, int64_t end, const Row& row, const Array& dx) const {
    Sums sums[kSweepPiece];
    for (int64_t r = begin; r < end; ++r) sums[r - begin] = {kNothing<T>, 0, 0, 0, 0, 0};
    for (int64_t c = 0; c < chunks_; ++c) {
      gemm(Op::none, Op::transpose, end - begin, cols(c), d_, x_ + (first + begin) * d_, d_,
           y_ + c * plan_.col_block * d_, d_, false, at(c, begin), plan_.col_block, row.gemm);
      for (int64_t r = begin; r < end; ++r) exponentiate(first, r, c, row, sums[r - begin]);
    }
    for (int64_t r = begin; r < end; ++r) finish_row(first, r, row, sums[r - begin]);
    if (!dx_) return;
    T* out = dx_ + (first + begin) * d_;
    for (int64_t c = 0; c < chunks_; ++c)
      gemm(Op::none, Op::none, end - begin, d_, cols(c), at(c, begin), plan_.col_block,
           y_ + c * plan_.col_block * d_, d_, c > 0, out, d_, row.gemm);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = 0; k < d_; ++k) out[(r - begin) * d_ + k] *= factor_[r] * scale_;
    deliver_rows(dx, dx_, x_, static_cast<T*>(w_.x_norm), p_.normalize, first + begin, first + end);
  }

  // Scores of one row and block of columns become exponentials.
  void exponentiate(int64_t first, int64_t r, int64_t c, const Row& row, Sums& sums) const {
    const Span at_ = span(first + r, c);
    T *scores = at(c, r), *logits = row.logits;
    const int64_t width = padded<T>(at_.cols);
    std::fill(scores + at_.cols, scores + width, T(0));
    logits_of(h_, at_, scores, logits);
    const PairTarget& target = h_.head->target;
    visit_targets(target, at_, [&](int64_t j, double weight) {
      sums.target += T(weight) * logits[j];
      sums.target_scores += T(weight) * scores[j];
      sums.target_weight += T(weight);
    });
    if (is_dense(target)) {
      dense_targets(target, at_, scores, row.targets);
      sums.target += dot(row.targets, logits, at_.cols);
      sums.target_scores += dot(row.targets, scores, at_.cols);
      for (int64_t j = 0; j < at_.cols; ++j) sums.target_weight += row.targets[j];
    }
    mask_logits(h_.head->mask, at_, scores, logits);
    if (const T high = largest(logits, at_.cols); high > sums.reference + T(kSlack)) raise(r, c, high, sums);
    const T base = sums.reference == kNothing<T> ? T(0) : sums.reference;
    Vec<T> total{}, total_scores{};
    for (int64_t j = 0; j < width; j += lanes<T>) {
      const Vec<T> e = exp_or_zero<T>(load<T>(logits + j) - base);
      total += e;
      total_scores += e * load<T>(scores + j);
      store<T>(scores + j, e);
    }
    sums.total += sum<T>(total);
    sums.total_scores += sum<T>(total_scores);
  }

  void raise(int64_t r, int64_t c, T high, Sums& sums) const {
    const T shrink = std::exp(sums.reference - high);
    sums.reference = high;
    sums.total *= shrink;
    sums.total_scores *= shrink;
    for (int64_t before = 0; before < c; ++before)
      for (int64_t j = 0; j < plan_.col_block; ++j) at(before, r)[j] *= shrink;
  }

  void finish_row(int64_t first, int64_t r, const Row& row, const Sums& sums) const {
    const int64_t i = first + r;
    const bool nothing = sums.total == T(0);  // no pair is allowed: only the target pulls
    const T total = nothing ? T(1) : sums.total, weight = static_cast<const T*>(w_.weight)[i];
    factor_[r] = weight / total;
    static_cast<T*>(h_.peak)[i] = sums.reference + std::log(sums.total);
    static_cast<T*>(h_.t)[i] = sums.target;
    if (h_.scale_rows) static_cast<T*>(h_.scale_rows)[i] = weight * (sums.total_scores / total - sums.target_scores);
    if (h_.grad_row_bias) static_cast<T*>(h_.grad_row_bias)[i] = weight * (T(!nothing) - sums.target_weight);
    for (int64_t k = 0; k < d_; ++k) scaled_[r * d_ + k] = x_[i * d_ + k] * (factor_[r] * scale_);
    const PairTarget& target = h_.head->target;
    if (target.kind == PairTarget::Kind::none && !is_dense(target)) return;
    for (int64_t c = 0; c < chunks_; ++c) {
      const Span at_ = span(i, c);
      visit_targets(target, at_, [&](int64_t j, double w) { at(c, r)[j] -= total * T(w); });
      if (!is_dense(target)) continue;
      dense_targets(target, at_, at(c, r), row.targets);
      for (int64_t j = 0; j < at_.cols; ++j) at(c, r)[j] -= total * row.targets[j];
    }
  }

  void work_columns(int64_t rows, int64_t c, const Row& row) const {
    if (dy_)
      gemm(Op::transpose, Op::none, cols(c), d_, rows, at(c, 0), plan_.col_block, scaled_, d_, true,
           dy_ + c * plan_.col_block * d_, d_, row.gemm);
    if (T* out = static_cast<T*>(h_.grad_col_bias))
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < cols(c); ++j)
          out[c * plan_.col_block + j] += at(c, r)[j] * factor_[r];
  }

  const MaskedLseWork& w_;
  const MaskedLseProblem& p_;
  const LseHeadWork& h_;
  const SweepPlan plan_;
  const int64_t n_, m_, d_;
  T *x_, *y_, *dx_, *dy_, *block_, *scaled_, *factor_;
  const T scale_;
  const int64_t chunks_;
};

template <class T> void sweep(const MaskedLseWork& w, const Array& dx, const Array& dy) { Sweep<T>(w).run(dx, dy); }

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
MaskedLseSweep masked_lse_sweep_kernel(bool doubles) { return doubles ? sweep<double> : sweep<float>; }
}  // namespace FASTRET_ISA
}  // namespace fastret
