// pq_topk by lookups: a thread owns as many queries as a vector has lanes. Their tables lie interleaved, so that one
// aligned load is a word's part of the scores of all of them. No gather, which costs a load a lane anyway.
//
// The parts of a score are added book after book, whatever the width of the group and however books are sliced: a
// query's score has the same bits in any company.
#include "pq_topk.h"

#include <cmath>
#include <limits>

#include "../common/half.h"
#include "candidates.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

template <class T, int W> struct Group {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
  static type load(const T* p) {
    type v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, type v) { __builtin_memcpy(p, &v, sizeof v); }
};

template <class T> class PqTopk {
 public:
  explicit PqTopk(const PqTopkWork& w)
      : w_(w), p_(w.problem), books_(p_.books()), words_(p_.words), width_(p_.codebook.cols),
        sign_(p_.distances() ? T(-1) : T(1)) {}

  int64_t thread_bytes() const { return Space(*this, nullptr).bytes; }

  void run(const Array& scores, const Array& indices) const {
    const int64_t n = p_.query.rows, parts = w_.plan.parts, groups = (n + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(p_.threads)
    {
      const Space space(*this, w_.threads + thread_number() * w_.thread_bytes);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < groups * parts; ++t) {
        const int64_t begin = t / parts * kLanes, rows = std::min<int64_t>(n - begin, kLanes);
        if (p_.codes.dtype == DType::u8) search<kLanes, uint8_t>(begin, rows, t % parts, space, scores, indices);
        else search<kLanes, uint16_t>(begin, rows, t % parts, space, scores, indices);
      }
      if (parts > 1) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) merge(i, scores, indices);
      }
    }
  }

 private:
  static constexpr int kLanes = lanes<T>;
  static constexpr int64_t kNarrowest = 16;  // bytes of a group's vector
  // Tables of a slice of books stay in L2; while a block of codes is looked up in them, its sums do, or stay in L1.
  // With K = 4,096 and 10 books, 512 KiB were measured 1.4 times as fast as 256 KiB, and 1.6 times as all at once.
  static constexpr int64_t kSliceBytes = 512 << 10, kBlock = 256, kBlockOfSlices = 2048;

  template <int W> int64_t slice() const {
    return std::clamp<int64_t>(kSliceBytes / (words_ * W * int64_t(sizeof(T))), 1, books_);
  }
  template <int W> int64_t block() const { return slice<W>() < books_ ? kBlockOfSlices : kBlock; }

  // A thread's own memory, of which `bytes` are needed. What belongs to a query of the group is one lane.
  struct Space {
    T* queries;      // column after column
    T* table;        // book after book, word after word
    T* sums;         // code after code of a block
    T* power;        // of two, that sums of rounded tables are multiplied by
    T* bound;        // sums have to be greater
    int64_t* count;  // of candidates
    Key<T>* candidates;
    int64_t bytes = 0;

    Space(const PqTopk& own, char* base) {
      auto take = [&](auto*& place, int64_t elements) {
        place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(base + bytes);
        bytes += (elements * int64_t(sizeof *place) + 63) / 64 * 64;
      };
      take(queries, own.books_ * own.width_ * kLanes);
      take(table, own.books_ * own.words_ * kLanes);
      take(sums, own.template block<kLanes>() * kLanes);
      take(power, kLanes);
      take(bound, kLanes);
      take(count, kLanes);
      take(candidates, own.w_.plan.capacity * kLanes);
    }
  };

  // Groups of few queries are narrower: their tables are smaller.
  template <int W, class Code>
  void search(int64_t begin, int64_t rows, int64_t part, const Space& space, const Array& scores,
              const Array& indices) const {
    if constexpr (W * sizeof(T) > kNarrowest)
      if (rows <= W / 2) return search<W / 2, Code>(begin, rows, part, space, scores, indices);
    make_table<W>(begin, rows, space);
    std::fill(space.bound, space.bound + rows, kNothing<T>);
    std::fill(space.bound + rows, space.bound + W, -kNothing<T>);  // nobody's lane
    std::fill(space.count, space.count + rows, int64_t(0));
    const int64_t first = part * w_.plan.part_rows, last = std::min(p_.codes.rows, first + w_.plan.part_rows);
    for (int64_t at = first; at < last; at += block<W>()) {
      const int64_t count = std::min(block<W>(), last - at);
      const Code* codes = p_.codes.as<Code>() + at * p_.codes.stride;
      for (int64_t book = 0; book < books_; book += slice<W>()) add_slice<W>(codes, count, book, space);
      collect<W>(at, count, space);
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

  template <int W> void make_table(int64_t begin, int64_t rows, const Space& space) const {
    using V = Group<T, W>;
    const int64_t columns = books_ * width_, entries = books_ * words_;
    std::fill(space.queries, space.queries + columns * W, T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const T* query = p_.query.as<T>() + (begin + r) * p_.query.stride;
      for (int64_t c = 0; c < columns; ++c) space.queries[c * W + r] = query[c];
    }
    for (int64_t e = 0; e < entries; ++e) {
      const T* word = p_.codebook.as<T>() + e * p_.codebook.stride;
      const T* query = space.queries + e / words_ * width_ * W;
      typename V::type sum{};
      for (int64_t l = 0; l < width_; ++l) {
        const typename V::type q = V::load(query + l * W), difference = q - word[l];
        sum += p_.distances() ? difference * difference : q * word[l];
      }
      V::store(space.table + e * W, sum);
    }
    if (p_.metric == PqMetric::l21)
      for (int64_t i = 0; i < entries * W; ++i) space.table[i] = std::sqrt(space.table[i]);
    if (p_.distances())
      for (int64_t i = 0; i < entries * W; ++i) space.table[i] = -space.table[i];
    if (p_.half_tables) round_table<W>(entries, space);
  }

  // To float16, each lane's entries over a power of two of its own.
  template <int W> void round_table(int64_t entries, const Space& space) const {
    constexpr int kReach = 15, kLeast = std::numeric_limits<T>::min_exponent - 1;
    T inverse[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      T greatest = 0;
      for (int64_t e = 0; e < entries; ++e) {
        const T size = std::abs(space.table[e * W + lane]);
        if (size > greatest && size <= std::numeric_limits<T>::max()) greatest = size;
      }
      int exponent = 0;
      std::frexp(greatest, &exponent);
      exponent = std::max(exponent - kReach, kLeast);
      space.power[lane] = std::ldexp(T(1), exponent);
      inverse[lane] = std::ldexp(T(1), -exponent);
    }
    for (int64_t e = 0; e < entries; ++e)
      for (int64_t lane = 0; lane < W; ++lane) {
        T& entry = space.table[e * W + lane];
        Half half;
        narrow(float(entry * inverse[lane]), half);
        entry = T(widen(half));
      }
  }

  template <int W, class Code>
  void add_slice(const Code* codes, int64_t count, int64_t book, const Space& space) const {
    constexpr int64_t kTogether = 8;  // independent sums, while lookups wait for L2
    int64_t i = 0;
    for (; i + kTogether <= count; i += kTogether) add<W, kTogether>(codes, i, book, space);
    for (; i < count; ++i) add<W, 1>(codes, i, book, space);
  }

  // The books of the slice are added to the sums of U codes from i on.
  template <int W, int64_t U, class Code> void add(const Code* codes, int64_t i, int64_t book, const Space& space) const {
    using V = Group<T, W>;
    const int64_t end = std::min(books_, book + slice<W>()), stride = p_.codes.stride;
    typename V::type sum[U]{};
    if (book > 0)
      for (int64_t u = 0; u < U; ++u) sum[u] = V::load(space.sums + (i + u) * W);
    const T* table = space.table + book * words_ * W;
    codes += i * stride;
    for (int64_t m = book; m < end; ++m, table += words_ * W)
#pragma GCC unroll 8
      for (int64_t u = 0; u < U; ++u) sum[u] += V::load(table + int64_t(codes[u * stride + m]) * W);
    if (p_.half_tables && end == books_) {
      const typename V::type power = V::load(space.power);
      for (int64_t u = 0; u < U; ++u) sum[u] *= power;
    }
    for (int64_t u = 0; u < U; ++u) V::store(space.sums + (i + u) * W, sum[u]);
  }

  // The good ones of a block's sums join their queries' candidates.
  template <int W> void collect(int64_t first, int64_t count, const Space& space) const {
    using V = Group<T, W>;
    typename V::type bound = V::load(space.bound);
    for (int64_t i = 0; i < count; ++i) {
      const T* sums = space.sums + i * W;
      uint32_t better = lanes_above(V::load(sums), bound);
      if (!better) continue;
      for (; better; better &= better - 1) join_candidates(__builtin_ctz(better), sums, first + i, space);
      bound = V::load(space.bound);
    }
  }

  void join_candidates(int64_t lane, const T* sums, int64_t index, const Space& space) const {
    Key<T>* candidates = space.candidates + lane * w_.plan.capacity;
    int64_t& count = space.count[lane];
    candidates[count++] = key_of(sums[lane], index);
    if (count < w_.plan.capacity) return;
    count = keep_best(candidates, count, w_.keep);
    space.bound[lane] = score_of<T>(candidates[count - 1]);
  }

  void merge(int64_t i, const Array& scores, const Array& indices) const {
    const int64_t first = i * w_.plan.parts;
    Key<T>* lists = static_cast<Key<T>*>(w_.parts) + first * w_.keep;
    finish(i, lists, join(lists, w_.part_counts + first, w_.plan.parts, w_.keep), scores, indices);
  }

  void finish(int64_t i, Key<T>* candidates, int64_t count, const Array& scores, const Array& indices) const {
    deliver(candidates, count, w_.keep, sign_, p_.first_index, i, scores, indices);
  }

  const PqTopkWork& w_;
  const PqTopkProblem& p_;
  const int64_t books_, words_, width_;
  const T sign_;  // turns a score into what is to be great
};

template <class T> int64_t thread_bytes(const PqTopkWork& w) { return PqTopk<T>(w).thread_bytes(); }
template <class T> void run(const PqTopkWork& w, const Array& scores, const Array& indices) {
  PqTopk<T>(w).run(scores, indices);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
PqTopkKernels pq_topk_kernels(bool doubles) {
  return doubles ? PqTopkKernels{lanes<double>, thread_bytes<double>, run<double>}
                 : PqTopkKernels{lanes<float>, thread_bytes<float>, run<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
