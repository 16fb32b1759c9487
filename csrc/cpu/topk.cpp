// topk by tiles: a thread owns a block of queries and walks the columns (or, where there are few queries, a part of
// them) from the lowest on. Of a row of scores only those better than the row's bound join its candidates; when there
// is no room for another tile's worth, all but the k best are dropped, and the worst of these becomes the bound.
#include "topk.h"

#include <algorithm>
#include <type_traits>

#include "candidates.h"
#include "gemm.h"
#include "pack.h"
#include "pair_rows.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

template <class T> class Topk {
 public:
  explicit Topk(const TopkWork& w)
      : w_(w), p_(w.problem), d_(p_.x.cols), normalize_(p_.metric == TopkMetric::cosine),
        sign_(p_.distances() ? T(-1) : T(1)) {}

  int64_t thread_bytes() const { return Space(w_, d_, nullptr).bytes; }

  void run(const Array& scores, const Array& indices) const {
    const int64_t n = p_.x.rows, parts = w_.plan.parts, blocks = (n + w_.plan.row_block - 1) / w_.plan.row_block;
#pragma omp parallel num_threads(p_.threads)
    {
      const SerialBlas serial;
      const Space space(w_, d_, w_.threads + thread_number() * w_.thread_bytes);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < blocks * parts; ++t) search(t / parts, t % parts, space, scores, indices);
      if (parts > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) merge(i, scores, indices);
      }
    }
  }

 private:
  static constexpr int64_t kCols = TopkPlan::kCols;

  // A thread's own memory, of which `bytes` are needed.
  struct Space {
    T *x, *x_own, *y, *y_own;  // packed rows; of each its norm, then (l2) the sum of its squares
    T *tile, *gemm;
    T* bound;        // per row: scores have to be greater
    int64_t* count;  // per row
    Key<T>* candidates;
    int64_t bytes = 0;

    Space(const TopkWork& w, int64_t d, char* base) {
      const int64_t rows = w.plan.row_block;
      auto take = [&](auto*& place, int64_t elements) {
        place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(base + bytes);
        bytes += (elements * int64_t(sizeof *place) + 63) / 64 * 64;
      };
      take(x, rows * d);
      take(x_own, rows);
      take(y, w.pack_y ? kCols * d : 0);
      take(y_own, kCols);
      take(tile, rows * kCols);
      take(gemm, kGemmWorkspace);
      take(bound, rows);
      take(count, rows);
      take(candidates, rows * w.plan.capacity);
    }
  };

  struct Rows {
    const T* data;
    int64_t stride;
  };

  void search(int64_t block, int64_t part, const Space& space, const Array& scores, const Array& indices) const {
    const int64_t begin = block * w_.plan.row_block, rows = std::min(p_.x.rows - begin, w_.plan.row_block);
    const int64_t first = part * w_.plan.part_cols, last = std::min(p_.y.rows, first + w_.plan.part_cols);
    const Rows x = packed(p_.x, begin, rows, space.x, space.x_own);
    std::fill(space.bound, space.bound + rows, kNothing<T>);
    std::fill(space.count, space.count + rows, int64_t(0));
    for (int64_t col = first; col < last; col += kCols) {
      const int64_t cols = std::min(kCols, last - col);
      const Rows y = w_.pack_y ? packed(p_.y, col, cols, space.y, space.y_own)
                               : placed(p_.y, col, cols, space.y_own);
      gemm(Op::none, Op::transpose, rows, cols, d_, x.data, x.stride, y.data, y.stride, false, space.tile, kCols,
           space.gemm);
      for (int64_t r = 0; r < rows; ++r) collect(r, {begin + r, col, cols, p_.first_column}, space);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Key<T>* candidates = space.candidates + r * w_.plan.capacity;
      if (w_.plan.parts == 1) {
        finish(begin + r, candidates, space.count[r], scores, indices);
        continue;
      }
      const int64_t list = (begin + r) * w_.plan.parts + part, kept = keep_best(candidates, space.count[r], w_.keep);
      w_.part_counts[list] = kept;
      std::copy(candidates, candidates + kept, static_cast<Key<T>*>(w_.parts) + list * w_.keep);
    }
  }

  Rows packed(const Array& a, int64_t begin, int64_t rows, T* out, T* own) const {
    Array slice = a;
    slice.data = a.as<char>() + begin * a.stride * item_size(a.dtype);
    pack_rows(slice, nullptr, normalize_, 0, rows, out, own);
    if (p_.distances()) squares(out, d_, rows, own);
    return {out, d_};
  }

  Rows placed(const Array& a, int64_t begin, int64_t rows, T* own) const {
    const T* data = a.as<T>() + begin * a.stride;
    if (p_.distances()) squares(data, a.stride, rows, own);
    return {data, a.stride};
  }

  void squares(const T* rows, int64_t stride, int64_t count, T* out) const {
    for (int64_t r = 0; r < count; ++r) out[r] = dot(rows + r * stride, rows + r * stride, d_);
  }

  // The products of a row of the tile become scores; the good ones join the row's candidates.
  void collect(int64_t r, const Span& at, const Space& space) const {
    constexpr int64_t V = lanes<T>;
    T* scores = space.tile + r * kCols;
    if (p_.distances()) {
      for (int64_t j = 0; j < at.cols; j += V) {
        const Vec<T> d = (space.x_own[r] + load<T>(space.y_own + j)) - T(2) * load<T>(scores + j);
        store<T>(scores + j, d < T(0) ? Vec<T>{} : d);  // rounding made it so; NaN stays
      }
    }
    apply_mask(p_.mask, at, scores, sign_ * kNothing<T>, scores);
    if (w_.keep == 1) return collect_one(r, at, scores, space);
    int64_t& count = space.count[r];
    Key<T>* candidates = space.candidates + r * w_.plan.capacity;
    if (count + at.cols > w_.plan.capacity) {
      count = keep_best(candidates, count, w_.keep);
      space.bound[r] = score_of<T>(candidates[count - 1]);
    }
    const Vec<T> bound = splat(space.bound[r]);
    for (int64_t j = 0; j < at.cols; j += V) {
      uint32_t better = lanes_above(load<T>(scores + j) * sign_, bound);
      if (j + V > at.cols) better &= (1u << (at.cols - j)) - 1;
      for (; better; better &= better - 1) {
        const int64_t place = j + __builtin_ctz(better);
        candidates[count++] = key_of(sign_ * scores[place], at.col + place);
      }
    }
  }

  // The same where one is looked for, as k-means does: a maximum, and where it stands. It was measured 12 times as fast
  // as the above, where all columns of the first tile are candidates.
  void collect_one(int64_t r, const Span& at, const T* scores, const Space& space) const {
    constexpr int64_t V = lanes<T>;
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    auto signed_scores = [&](int64_t j) {
      return sign_ * (j + V > at.cols ? load_tail<T>(scores + j, at.cols - j, sign_ * kNothing<T>) : load<T>(scores + j));
    };
    Vec<T> best[2] = {splat(kNothing<T>), splat(kNothing<T>)};  // two chains: a comparison waits for the one before
    Bits<T> where[2] = {};                                      // the vector that a lane's best is in
    for (int64_t j = 0; j < at.cols; j += 2 * V) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const Vec<T> v = signed_scores(j + c * V);
        const Bits<T> better = v > best[c];  // NaN is not
        best[c] = better ? v : best[c];
        where[c] = better ? Bits<T>{} + Int(j + c * V) : where[c];
      }
    }
    const T greatest = all_lanes<T>(best[0] > best[1] ? best[0] : best[1], [](auto a, auto b) { return a > b ? a : b; })[0];
    if (!(greatest > space.bound[r])) return;
    Bits<T> lane, first = Bits<T>{} + std::numeric_limits<Int>::max();
    for (int i = 0; i < V; ++i) lane[i] = i;
    for (int c = 0; c < 2; ++c) {
      const Bits<T> place = where[c] + lane;
      first = (best[c] == greatest) & (place < first) ? place : first;
    }
    const int64_t place = all_lanes<T>(first, [](auto a, auto b) { return a < b ? a : b; })[0];
    space.candidates[r * w_.plan.capacity] = key_of(greatest, at.col + place);
    space.count[r] = 1;
    space.bound[r] = greatest;
  }

  // An associative operation of all lanes, in every lane.
  template <class Lane, class V, class Operation> static V all_lanes(V v, Operation of) {
    constexpr int count = lanes<Lane>;
#pragma GCC unroll 4
    for (int step = count / 2; step > 0; step /= 2) {
      Bits<Lane> turned;
      for (int i = 0; i < count; ++i) turned[i] = (i + step) % count;
      v = of(v, __builtin_shuffle(v, turned));
    }
    return v;
  }

  void merge(int64_t i, const Array& scores, const Array& indices) const {
    const int64_t first = i * w_.plan.parts;
    Key<T>* lists = static_cast<Key<T>*>(w_.parts) + first * w_.keep;
    finish(i, lists, join(lists, w_.part_counts + first, w_.plan.parts, w_.keep), scores, indices);
  }

  void finish(int64_t i, Key<T>* candidates, int64_t count, const Array& scores, const Array& indices) const {
    deliver(candidates, count, w_.keep, sign_, p_.first_column, i, scores, indices);
  }

  const TopkWork& w_;
  const TopkProblem& p_;
  const int64_t d_;
  const bool normalize_;
  const T sign_;  // turns a score into what is to be great
};

template <class T> int64_t thread_bytes(const TopkWork& w) { return Topk<T>(w).thread_bytes(); }
template <class T> void run(const TopkWork& w, const Array& scores, const Array& indices) {
  Topk<T>(w).run(scores, indices);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
TopkKernels topk_kernels(bool doubles) {
  return doubles ? TopkKernels{thread_bytes<double>, run<double>} : TopkKernels{thread_bytes<float>, run<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
