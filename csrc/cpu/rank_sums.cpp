// rank_sums: for a query q and each of its positives i, with p(q) the gallery rows of q's class,
//   rank_all = 1 + sum over j != i of sigmoid((s_qj - s_qi) / tau),   rank_pos = the same over j in p(q),
// and the gradient of any function of both. Everything is sorted by class first.
//
// Positives are exact and cheap: scores of each class against itself, G x G a class. Negatives come from tiles of
// S = X Y^T in which the positives are masked out (score -inf, sigmoid 0). Where the gallery is the batch, S is
// symmetric: only block pairs I > J are multiplied, the tile serves the queries of I and, transposed, those of J;
// backward turns it into T = f(q; j) + f(j; q) and adds T X_J and T^T X_I: half a product forward, one and a half
// backward. Rounds of disjoint block pairs (plan.h) need no atomics and add in the same order in every run.
#include "rank_sums.h"

#include "gemm.h"
#include "pack.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

constexpr int kChunk = 4;  // positives worked at once: their accumulators stay in registers

// out[g] += sum over j of sigmoid((s_j - positive_g) / tau); steepness = log2(e) / tau
template <class T, int G> void rank_chunk(const T* s, int64_t n, const T* positive, T steepness, T* out) {
  constexpr int64_t V = lanes<T>;
  Vec<T> total[G] = {}, at[G];
  for (int g = 0; g < G; ++g) at[g] = splat(positive[g]);
  auto accumulate = [&](Vec<T> v) {
    for (int g = 0; g < G; ++g) total[g] += T(1) / (T(1) + exp2((at[g] - v) * steepness));
  };
  int64_t j = 0;
  for (; j + V <= n; j += V) accumulate(load<T>(s + j));
  if (j < n) accumulate(load_tail<T>(s + j, n - j, -std::numeric_limits<T>::infinity()));
  for (int g = 0; g < G; ++g) out[g] += sum<T>(total[g]);
}

// t_j (+)= sum over g of weight_g sigmoid'_gj and slope[g] += sum over j of sigmoid'_gj, with sigmoid' = u (1 - u)
template <class T, int G>
void slope_chunk(const T* s, int64_t n, const T* positive, const T* weight, T steepness, bool add, T* t, T* slope) {
  constexpr int64_t V = lanes<T>;
  Vec<T> total[G] = {}, at[G], w[G];
  for (int g = 0; g < G; ++g) {
    at[g] = splat(positive[g]);
    w[g] = splat(weight[g]);
  }
  auto accumulate = [&](Vec<T> v, Vec<T> result) {
    for (int g = 0; g < G; ++g) {
      const Vec<T> e = exp2((at[g] - v) * steepness), u = T(1) / (T(1) + e), d = e * u * u;
      total[g] += d;
      result += w[g] * d;
    }
    return result;
  };
  int64_t j = 0;
  for (; j + V <= n; j += V) store<T>(t + j, accumulate(load<T>(s + j), add ? load<T>(t + j) : Vec<T>{}));
  if (j < n) {
    const Vec<T> v = load_tail<T>(s + j, n - j, -std::numeric_limits<T>::infinity());
    store_tail<T>(t + j, accumulate(v, add ? load_tail<T>(t + j, n - j, T(0)) : Vec<T>{}), n - j);
  }
  for (int g = 0; g < G; ++g) slope[g] += sum<T>(total[g]);
}

template <class T> void rank_row(const T* s, int64_t n, const T* positive, int64_t count, T steepness, T* out) {
  for (int64_t g = 0; g < count; g += kChunk) switch (count - g) {
      case 1: rank_chunk<T, 1>(s, n, positive + g, steepness, out + g); break;
      case 2: rank_chunk<T, 2>(s, n, positive + g, steepness, out + g); break;
      case 3: rank_chunk<T, 3>(s, n, positive + g, steepness, out + g); break;
      default: rank_chunk<T, kChunk>(s, n, positive + g, steepness, out + g);
    }
}

template <class T>
void slope_row(const T* s, int64_t n, const T* positive, const T* weight, int64_t count, T steepness, T* t, T* slope) {
  if (count == 0) std::fill(t, t + n, T(0));
  for (int64_t g = 0; g < count; g += kChunk) switch (count - g) {
      case 1: slope_chunk<T, 1>(s, n, positive + g, weight + g, steepness, g > 0, t, slope + g); break;
      case 2: slope_chunk<T, 2>(s, n, positive + g, weight + g, steepness, g > 0, t, slope + g); break;
      case 3: slope_chunk<T, 3>(s, n, positive + g, weight + g, steepness, g > 0, t, slope + g); break;
      default: slope_chunk<T, kChunk>(s, n, positive + g, weight + g, steepness, g > 0, t, slope + g);
    }
}

template <class T> struct ThreadSpace {
  T *tile, *turned;                   // a block pair's scores, and their transpose
  T *scores, *at, *weights, *slopes;  // one row: as long as a block or as the largest class
  T* gemm;
  static int64_t row_elements(const Plan& p, int64_t largest) {
    return std::max(std::max(p.row_block, p.col_block), largest);
  }
  static int64_t elements(const Plan& p, int64_t largest) {
    return 2 * p.row_block * p.col_block + 4 * row_elements(p, largest) + kGemmWorkspace;
  }
  ThreadSpace(const RankSumsWork& w, int thread) {
    tile = reinterpret_cast<T*>(w.threads + thread * w.thread_bytes);
    turned = tile + w.plan.row_block * w.plan.col_block;
    gemm = turned + w.plan.row_block * w.plan.col_block;
    scores = gemm + kGemmWorkspace;
    const int64_t row = row_elements(w.plan, w.layout.largest);
    at = scores + row;
    weights = at + row;
    slopes = weights + row;
  }
};

template <class T> class RankSums {
 public:
  explicit RankSums(const RankSumsWork& w)
      : w_(w), p_(w.problem), layout_(w.layout), n_(p_.x.rows), m_(p_.y.rows), d_(p_.x.cols),
        x_(static_cast<T*>(w.x)), y_(static_cast<T*>(w.y)), positives_(static_cast<T*>(w.positives)),
        slopes_(static_cast<T*>(w.slopes)), dx_(static_cast<T*>(w.dx)), dy_(static_cast<T*>(w.dy)),
        steepness_(finite(1.4426950408889634 / p_.temperature)) {}

  void forward(T* rank_all, T* rank_pos) {
    T poison = 0;
#pragma omp parallel num_threads(p_.threads) reduction(+ : poison)
    {
      const SerialBlas serial;
      const ThreadSpace<T> space(w_, thread_number());
      poison += pack();
      score_positives(space);
      rank_positives(rank_all, rank_pos);
      for_tiles(n_, m_, w_.plan, p_.symmetric, [&](const Tile& t) { rank_tile(t, space, rank_all); });
    }
    if (poison != poison)  // sigmoids are bounded: without this a NaN or infinite row could pass unseen
      for (int64_t k = 0; k < layout_.pairs(); ++k) rank_all[k] = rank_pos[k] = poison;
  }

  void backward(const T* grad_all, const T* grad_pos, const Array& dx, const Array& dy) {
    grad_all_ = grad_all;
    grad_pos_ = grad_pos;
#pragma omp parallel num_threads(p_.threads)
    {
      const SerialBlas serial;
      const ThreadSpace<T> space(w_, thread_number());
      pack();
      clear(dx_, n_ * d_);
      if (!p_.symmetric) clear(dy_, m_ * d_);
      clear(slopes_, layout_.pairs());
      score_positives(space);
      for_tiles(n_, m_, w_.plan, p_.symmetric, [&](const Tile& t) { gradient_tile(t, space); });
      gradient_positives(space);
      deliver(dx, dx_, x_, static_cast<T*>(w_.x_norm), layout_.query_order.data(), w_.dx_cycles, w_.dx_cycle_count);
      if (!p_.symmetric)
        deliver(dy, dy_, y_, static_cast<T*>(w_.y_norm), p_.order.template as<int64_t>(), w_.dy_cycles, w_.dy_cycle_count);
    }
  }

 private:
  // Any temperature a double can hold: 0 * inf and inf * 0 would be NaN.
  static T finite(double v) {
    constexpr double limit = sizeof(T) == 4 ? 1e37 : 1e300;
    return T(v > limit ? limit : v < 1 / limit ? 1 / limit : v);
  }

  // Every function below is called by all threads of the region; its loops share the work and end in a barrier.

  T pack() {
    T poison = place_rows(p_.x, w_.pack_x, p_.normalize, layout_.query_order.data(), x_, static_cast<T*>(w_.x_norm));
    if (!p_.symmetric)
      poison += place_rows(p_.y, w_.pack_y, p_.normalize, p_.order.template as<int64_t>(), y_,
                           static_cast<T*>(w_.y_norm));
    return poison;
  }

  void score_positives(const ThreadSpace<T>& space) const {
    const int64_t blocks = int64_t(layout_.by_query.size());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const ClassBlock& c = layout_.by_query[b];
      const int64_t size = c.item_end - c.item;
      gemm(Op::none, Op::transpose, c.query_end - c.query, size, d_, x_ + c.query * d_, d_, y_ + c.item * d_, d_, false,
           positives_ + layout_.pair[c.query], size, space.gemm);
    }
  }

  void rank_positives(T* rank_all, T* rank_pos) const {
    const int64_t blocks = int64_t(layout_.by_query.size());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const ClassBlock& c = layout_.by_query[b];
      const int64_t size = c.item_end - c.item;
      for (int64_t q = c.query; q < c.query_end; ++q) {
        T* scores = positives_ + layout_.pair[q];
        T *pos = rank_pos + layout_.out[q], *all = rank_all + layout_.out[q];
        // j = i contributes sigmoid(0) = 1/2 where the definition counts 1
        std::fill(pos, pos + size, T(0.5));
        if (!p_.exclude_self) {
          rank_row(scores, size, scores, size, steepness_, pos);
        } else {
          const int64_t self = q - c.item;
          const T own = scores[self];
          scores[self] = -std::numeric_limits<T>::infinity();
          rank_row(scores, size, scores, size, steepness_, pos);
          scores[self] = own;
          pos[self] = 0;  // the excluded slot: precision 0 / 1
        }
        for (int64_t i = 0; i < size; ++i) all[i] = pos[i];
        if (p_.exclude_self) all[q - c.item] = 1;
      }
    }
  }

  // Scores of a tile, positives masked; a class relation is symmetric, so the transposed tile is masked too.
  void score_tile(const Tile& t, const ThreadSpace<T>& space) const {
    gemm(Op::none, Op::transpose, t.rows(), t.cols(), d_, x_ + t.row * d_, d_, y_ + t.col * d_, d_, false, space.tile,
         w_.plan.col_block, space.gemm);
    for (int64_t q = t.row; q < t.row_end; ++q) {
      const int64_t first = std::max(layout_.start[q], t.col), last = std::min(layout_.end[q], t.col_end);
      T* row = space.tile + (q - t.row) * w_.plan.col_block;
      for (int64_t j = first; j < last; ++j) row[j - t.col] = -std::numeric_limits<T>::infinity();
    }
    if (t.two_sided)
      transpose<false>(space.tile, w_.plan.col_block, t.rows(), t.cols(), space.turned, w_.plan.row_block);
  }

  void rank_tile(const Tile& t, const ThreadSpace<T>& space, T* rank_all) const {
    score_tile(t, space);
    auto rank_rows = [&](const T* tile, int64_t stride, int64_t begin, int64_t end, int64_t cols) {
      for (int64_t q = begin; q < end; ++q) {
        const int64_t self = self_slot(q);
        T* out = rank_all + layout_.out[q];
        rank_row(tile + (q - begin) * stride, cols, positives_ + layout_.pair[q], count(q), steepness_, out);
        if (self >= 0) out[self] = 1;
      }
    };
    rank_rows(space.tile, w_.plan.col_block, t.row, t.row_end, t.cols());
    if (t.two_sided) rank_rows(space.turned, w_.plan.row_block, t.col, t.col_end, t.rows());
  }

  int64_t count(int64_t q) const { return layout_.end[q] - layout_.start[q]; }
  int64_t self_slot(int64_t q) const { return p_.exclude_self ? q - layout_.start[q] : -1; }

  // Upstream gradient of a query's sums over all; the excluded slot is a constant.
  const T* weights_of(int64_t q, const ThreadSpace<T>& space, bool among_positives) const {
    const T *all = grad_all_ + layout_.out[q], *pos = grad_pos_ + layout_.out[q];
    for (int64_t i = 0; i < count(q); ++i) space.weights[i] = among_positives ? all[i] + pos[i] : all[i];
    if (const int64_t self = self_slot(q); self >= 0) space.weights[self] = 0;
    return space.weights;
  }

  // dL/ds of a tile's negatives, without the common factor 1 / tau, in place of the scores
  void slope_rows(T* tile, int64_t stride, int64_t begin, int64_t end, int64_t cols, const ThreadSpace<T>& space) const {
    for (int64_t q = begin; q < end; ++q) {
      T* row = tile + (q - begin) * stride;
      std::copy(row, row + cols, space.scores);
      slope_row(space.scores, cols, positives_ + layout_.pair[q], weights_of(q, space, false), count(q), steepness_, row,
                slopes_ + layout_.pair[q]);
    }
  }

  void gradient_tile(const Tile& t, const ThreadSpace<T>& space) const {
    score_tile(t, space);
    slope_rows(space.tile, w_.plan.col_block, t.row, t.row_end, t.cols(), space);
    if (t.two_sided) {
      slope_rows(space.turned, w_.plan.row_block, t.col, t.col_end, t.rows(), space);
      transpose<true>(space.turned, w_.plan.row_block, t.cols(), t.rows(), space.tile, w_.plan.col_block);
    }
    if (dx_)
      gemm(Op::none, Op::none, t.rows(), d_, t.cols(), space.tile, w_.plan.col_block, y_ + t.col * d_, d_, true,
           dx_ + t.row * d_, d_, space.gemm);
    if (dy_)
      gemm(Op::transpose, Op::none, t.cols(), d_, t.rows(), space.tile, w_.plan.col_block, x_ + t.row * d_, d_, true,
           dy_ + t.col * d_, d_, space.gemm);
  }

  // dL/ds of the positive pairs: what they get as competitors of each other, minus what their own sums push back
  void gradient_positives(const ThreadSpace<T>& space) const {
    const int64_t queries = int64_t(layout_.by_query.size()), items = int64_t(layout_.by_item.size());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < queries; ++b) {
      const ClassBlock& c = layout_.by_query[b];
      for (int64_t q = c.query; q < c.query_end; ++q) slope_of_positives(q, space);
      if (dx_)
        gemm(Op::none, Op::none, c.query_end - c.query, d_, c.item_end - c.item, positives_ + layout_.pair[c.query],
             c.item_end - c.item, y_ + c.item * d_, d_, true, dx_ + c.query * d_, d_, space.gemm);
    }
    if (!dy_) return;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < items; ++b) {
      const ClassBlock& c = layout_.by_item[b];
      const int64_t size = count(c.query);
      gemm(Op::transpose, Op::none, c.item_end - c.item, d_, c.query_end - c.query,
           positives_ + layout_.pair[c.query] + (c.item - layout_.start[c.query]), size, x_ + c.query * d_, d_, true,
           dy_ + c.item * d_, d_, space.gemm);
    }
  }

  void slope_of_positives(int64_t q, const ThreadSpace<T>& space) const {
    const int64_t size = count(q), self = self_slot(q);
    T *scores = positives_ + layout_.pair[q], *negative = slopes_ + layout_.pair[q];
    std::copy(scores, scores + size, space.scores);
    std::copy(scores, scores + size, space.at);
    std::fill(space.slopes, space.slopes + size, T(0));
    if (self >= 0) space.scores[self] = -std::numeric_limits<T>::infinity();
    const T* weights = weights_of(q, space, true);
    slope_row(space.scores, size, space.at, weights, size, steepness_, scores, space.slopes);
    for (int64_t i = 0; i < size; ++i)
      scores[i] -= weights[i] * space.slopes[i] + grad_all_[layout_.out[q] + i] * negative[i];
    if (self >= 0) scores[self] = 0;
  }

  // Gradients of sorted unit rows become gradients of the caller's rows, in the caller's order and type.
  void deliver(const Array& out, T* du, const T* u, const T* norms, const int64_t* order, const int64_t* cycles,
               int64_t cycle_count) const {
    if (!du) return;
    const T factor = finite(1 / p_.temperature);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < out.rows; ++p) {
      T* row = du + p * d_;
      if (p_.normalize) project_row(row, u + p * d_, norms[p], d_);
      for (int64_t k = 0; k < d_; ++k) row[k] *= factor;
      if (du != out.data)
        with_type<T>(out, [&](auto* data) {
          for (int64_t k = 0; k < d_; ++k) narrow(row[k], data[order[p] * d_ + k]);
        });
    }
    if (cycle_count == 0) return;
    constexpr int64_t kSlice = 64;  // columns: every slice walks all cycles, slices share nothing
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < (d_ + kSlice - 1) / kSlice; ++slice) {
      const int64_t width = std::min(kSlice, d_ - slice * kSlice);
      T *column = du + slice * kSlice, carried[kSlice];
      for (int64_t c = 0; c < cycle_count; ++c) {
        std::copy(column + cycles[c] * d_, column + cycles[c] * d_ + width, carried);
        int64_t p = cycles[c];
        do {
          p = order[p];
          std::swap_ranges(carried, carried + width, column + p * d_);
        } while (p != cycles[c]);
      }
    }
  }

  const RankSumsWork& w_;
  const RankSumsProblem& p_;
  const ClassLayout& layout_;
  const int64_t n_, m_, d_;
  T *x_, *y_, *positives_, *slopes_, *dx_, *dy_;
  const T steepness_;
  const T *grad_all_ = nullptr, *grad_pos_ = nullptr;
};

template <class T> int64_t thread_elements(const Plan& plan, int64_t largest) {
  return ThreadSpace<T>::elements(plan, largest);
}
template <class T> void forward(const RankSumsWork& w, const Array& rank_all, const Array& rank_pos) {
  RankSums<T>(w).forward(rank_all.as<T>(), rank_pos.as<T>());
}
template <class T>
void backward(const RankSumsWork& w, const Array& grad_all, const Array& grad_pos, const Array& dx, const Array& dy) {
  RankSums<T>(w).backward(grad_all.as<T>(), grad_pos.as<T>(), dx, dy);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
RankSumsKernels rank_sums_kernels(bool doubles) {
  return doubles ? RankSumsKernels{thread_elements<double>, forward<double>, backward<double>}
                 : RankSumsKernels{thread_elements<float>, forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
