// soft_assign by blocks of rows and tiles of words. Rows are lanes: a tile holds, word after word, what all rows of the
// block have there. Maxima, codes and sums over words need no sum across lanes then, however few words there are, and
// keys, codebook and tiles are operands of the products as they lie:
//
//   scores  (words x rows) = keys x^T              soft^T (L x rows)  = codebook^T p
//   p'      (words x rows) = codebook G^T          dx^T   (E x rows)  = keys^T b
//   dkeys   (words x E)   += b x                   dcodebook (words x L) += p G
//
// where p, b are tiles of probabilities and of the gradients of scores. A task is a book and a range of rows; what is
// summed over rows has a place a range, merged in their order. Scores are computed alike everywhere, whatever the tile.
#include "soft_assign.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "assign_tiles.h"
#include "gemm.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

template <class T> class SoftAssign {
 public:
  explicit SoftAssign(const SoftAssignWork& w)
      : w_(w), p_(w.problem), n_(p_.rows().rows), books_(p_.books), words_(p_.words()),
        e_(p_.keys.data ? p_.keys.cols : 0), l_(p_.codebook.cols) {}

  int64_t thread_bytes() const { return Space(w_, nullptr).bytes; }

  void forward(const SoftAssignResult& r) const {
    const bool count = r.usage.data;
#pragma omp parallel num_threads(p_.threads)
    {
      const Space s(w_, w_.threads + thread_number() * w_.thread_bytes);
      for_ranges([&](const Range& range) {
        T* usage = count && !w_.plan.by_words ? place(r.usage, 0, range) : nullptr;
        if (usage) std::fill(usage, usage + words_, T(0));
        for_blocks(range, [&](const Block& b) { assign(b, r, usage, s); });
      });
      if (w_.plan.by_words)
        for_words([&](const Range& range, int64_t begin, int64_t end) {
          T* usage = place(r.usage, 0, range);
          std::fill(usage + begin, usage + end, T(0));
          for_blocks(range, [&](const Block& b) {
            load_x(b, s);
            count_usage(b, begin, end, r.lse, usage, s);
          });
        });
      merge(r.usage, 0, T(std::max<int64_t>(1, n_)));
    }
  }

  void backward(const SoftAssignUpstream& u, const SoftAssignGradient& g) const {
    const bool scores = g.rows.data || g.keys.data;
#pragma omp parallel num_threads(p_.threads)
    {
      const Space s(w_, w_.threads + thread_number() * w_.thread_bytes);
      if (!w_.plan.by_words) {
        for_ranges([&](const Range& range) { gradients(range, {0, words_, scores, scores, true}, u, g, s); });
      } else {
        if (scores) for_ranges([&](const Range& range) { gradients(range, {0, words_, true, true, false}, u, g, s); });
        for_words([&](const Range& range, int64_t begin, int64_t end) {
          gradients(range, {begin, end, false, false, true}, u, g, s);
        });
      }
      merge(g.keys, 0, T(1));
      merge(g.bias, size(g.keys), T(1));
      merge(g.codebook, size(g.keys) + size(g.bias), T(1));
    }
  }

 private:
  using Block = AssignBlock;
  using Space = AssignSpace<T>;

  // Rows [row, end) of a book, by number `index` of its ranges.
  struct Range {
    int64_t book, row, end, index;
  };
  // What is done of a range: words [begin, end); whether the sums over all words of p p' are made, or taken from
  // w_.dots; whether gradients of rows, and sums over rows, are wanted.
  struct Part {
    int64_t begin, end;
    bool dots, rows, sums;
  };

  template <class Visit> void for_ranges(Visit visit) const {
    const int64_t ranges = w_.plan.ranges, rows = w_.plan.range_rows;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < books_ * ranges; ++t) {
      const int64_t k = t % ranges;
      visit(Range{t / ranges, k * rows, std::min(n_, (k + 1) * rows), k});
    }
  }

  template <class Visit> void for_words(Visit visit) const {
    const int64_t step = w_.plan.sum_words, pieces = (words_ + step - 1) / step;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < books_ * pieces; ++t) {
      const int64_t begin = t % pieces * step;
      visit(Range{t / pieces, 0, n_, 0}, begin, std::min(words_, begin + step));
    }
  }

  template <class Visit> void for_blocks(const Range& range, Visit visit) const {
    for_chunks(range.end - range.row, kRowBlock, [&](int64_t begin, int64_t end) {
      visit(Block{range.book, range.row + begin, end - begin, padded<T>(end - begin)});
    });
  }

  static int64_t size(const Array& a) { return a.data ? a.rows * a.cols : 0; }

  // Where a range's sums over its rows begin for its book: of the first range in the output itself.
  T* place(const Array& out, int64_t offset, const Range& range) const {
    if (!out.data) return nullptr;
    T* all = range.index == 0 ? out.as<T>() : static_cast<T*>(w_.sums) + (range.index - 1) * w_.range_sums + offset;
    return all + range.book * (size(out) / books_);
  }

  void merge(const Array& out, int64_t offset, T divisor) const {
    constexpr int64_t kPiece = 1 << 12;
    const int64_t all = size(out);
    T* total = out.as<T>();
#pragma omp for schedule(static)
    for (int64_t at = 0; at < (all + kPiece - 1) / kPiece; ++at)
      for (int64_t i = at * kPiece; i < std::min(all, (at + 1) * kPiece); ++i) {
        for (int64_t k = 0; w_.sums && k < w_.plan.ranges - 1; ++k)
          total[i] += static_cast<const T*>(w_.sums)[k * w_.range_sums + offset + i];
        total[i] /= divisor;
      }
  }

  void load_x(const Block& b, const Space& s) const {
    if (!p_.keys.data) return;
    load_rows(p_.x, b.book * e_, e_, b, s.x);
    transpose<false>(s.x, padded<T>(e_), b.width, padded<T>(e_), s.x_turned, kRowBlock);
  }

  // The scores of words [begin, end), but for their biases.
  void multiply_scores(const Block& b, int64_t begin, int64_t end, const Space& s) const {
    if (p_.keys.data) {
      const T* keys = p_.keys.as<T>() + (b.book * words_ + begin) * e_;
      return multiply(end - begin, e_, keys, e_, 1, s.x_turned, kRowBlock, s.tile, kRowBlock, b.width, false);
    }
    for_chunks(end - begin, kStrip, [&](int64_t at, int64_t last) {
      const int64_t cols = last - at, stride = padded<T>(cols);
      load_rows(p_.logits, b.book * words_ + begin + at, cols, b, s.strip);
      transpose<false>(s.strip, stride, b.width, stride, s.tile + at * kRowBlock, kRowBlock);
    });
  }

  // visit(k, bias of that word) for words [from, to) of a tile that begins with word `begin`
  template <class Visit>
  void for_biases(const Block& b, int64_t begin, int64_t from, int64_t to, Visit visit) const {
    const T* bias = p_.bias.data ? p_.bias.as<T>() + b.book * words_ + begin : nullptr;
    for (int64_t k = from; k < to; ++k) visit(k, splat(bias ? bias[k] : T(0)));
  }

  void assign(const Block& b, const SoftAssignResult& r, T* usage, const Space& s) const {
    std::fill(s.top, s.top + b.width, kNothing<T>);
    std::fill(s.code, s.code + b.width, Word<T>(0));
    for (T* zero : {s.shift, s.sum, s.squares}) std::fill(zero, zero + b.width, T(0));
    load_x(b, s);
    for_chunks(words_, w_.plan.words, [&](int64_t begin, int64_t end) {
      multiply_scores(b, begin, end, s);
      find_best(b, begin, end, s);
      if (!r.lse.data) return;
      move_shift(b, r.soft.data && begin > 0 ? l_ : 0, s);
      exponentials(b, begin, end, s);
      if (r.soft.data)
        multiply(l_, end - begin, p_.codebook.as<T>() + (b.book * words_ + begin) * l_, 1, l_, s.tile, kRowBlock, s.out,
                 kRowBlock, b.width, begin > 0);
    });
    for (int64_t i = 0; i < b.count; ++i)
      r.codes.as<int64_t>()[(b.row + i) * r.codes.stride + b.book] = s.code[i];
    if (!r.lse.data) return;
    for (int64_t i = 0; i < b.width; ++i) {
      const T inverse = i < b.count ? T(1) / s.sum[i] : T(0);
      if (i < b.count) {
        r.lse.as<T>()[(b.row + i) * r.lse.stride + b.book] = s.shift[i] + std::log(s.sum[i]);
        if (r.purity.data)
          r.purity.as<T>()[(b.row + i) * r.purity.stride + b.book] = s.squares[i] * inverse * inverse;
      }
      s.sum[i] = inverse;
    }
    if (usage && words_ <= w_.plan.words) add_row_sums(s.tile, words_, b.width, s.sum, usage);
    if (r.soft.data) {
      scale(s.out, l_, b.width, s.sum);
      transpose<false>(s.out, kRowBlock, padded<T>(l_), b.width, s.g, padded<T>(l_));
      store_rows(s.g, r.soft, b.book * l_, l_, b);
    }
    if (usage && words_ > w_.plan.words) count_usage(b, 0, words_, r.lse, usage, s);
  }

  // Greatest score and its word so far, the lowest of equals; a NaN is none. The tile gets its biases.
  void find_best(const Block& b, int64_t begin, int64_t end, const Space& s) const {
    in_groups<T>(b.width, [&](auto group, int64_t j) {
      constexpr int G = decltype(group)::value;
      Vec<T> top[G];
      Bits<T> code[G];
      for (int g = 0; g < G; ++g) top[g] = load<T>(s.top + j + g * lanes<T>);
      std::memcpy(code, s.code + j, sizeof code);
      for_biases(b, begin, 0, end - begin, [&](int64_t k, Vec<T> bias) {
        const Bits<T> word = Bits<T>{} + Word<T>(begin + k);
        for (int g = 0; g < G; ++g) {
          const Vec<T> v = load<T>(s.tile + k * kRowBlock + j + g * lanes<T>) + bias;
          const auto above = v > top[g];
          top[g] = above ? v : top[g];
          code[g] = above ? word : code[g];
        }
      });
      for (int g = 0; g < G; ++g) store<T>(s.top + j + g * lanes<T>, top[g]);
      std::memcpy(s.code + j, code, sizeof code);
    });
  }

  // Sums of e^(score - shift) are carried on by a greater shift: the greatest score, or 0 as long as all are -inf.
  void move_shift(const Block& b, int64_t features, const Space& s) const {
    for (int64_t j = 0; j < b.width; j += lanes<T>) {
      const Vec<T> top = load<T>(s.top + j), shift = top == splat(kNothing<T>) ? Vec<T>{} : top;
      const Vec<T> factor = exp_or_zero<T>(load<T>(s.shift + j) - shift);
      store<T>(s.shift + j, shift);
      store<T>(s.found + j, factor);
      store<T>(s.sum + j, load<T>(s.sum + j) * factor);
      store<T>(s.squares + j, load<T>(s.squares + j) * factor * factor);
    }
    scale(s.out, features, b.width, s.found);
  }

  void exponentials(const Block& b, int64_t begin, int64_t end, const Space& s) const {
    in_runs<T>(end - begin, b.width, [&](int64_t from, int64_t to, auto group, int64_t j) {
      constexpr int G = decltype(group)::value;
      Vec<T> shift[G], total[G], squares[G];
      for (int g = 0; g < G; ++g) {
        shift[g] = load<T>(s.shift + j + g * lanes<T>);
        total[g] = squares[g] = Vec<T>{};
      }
      for_biases(b, begin, from, to, [&](int64_t k, Vec<T> bias) {
        T* row = s.tile + k * kRowBlock + j;
        for (int g = 0; g < G; ++g) {
          const Vec<T> e = share<T>((load<T>(row + g * lanes<T>) + bias) - shift[g]);
          store<T>(row + g * lanes<T>, e);
          total[g] += e;
          squares[g] += e * e;
        }
      });
      add_groups<T>(total, s.sum + j);
      add_groups<T>(squares, s.squares + j);
    });
  }

  // usage of words [begin, end) by rows whose log-sum-exp is known
  void count_usage(const Block& b, int64_t begin, int64_t end, const Array& lse, T* usage, const Space& s) const {
    load_lse(lse, b, s);
    for_chunks(end - begin, w_.plan.words, [&](int64_t at, int64_t last) {
      multiply_scores(b, begin + at, begin + last, s);
      probabilities(b, begin + at, begin + last, s);
      add_row_sums(s.tile, last - at, b.width, s.valid, usage + begin + at);
    });
  }

  void load_lse(const Array& lse, const Block& b, const Space& s) const {
    load_column(lse, b, -kNothing<T>, s.lse);
    for (int64_t r = 0; r < b.width; ++r) s.valid[r] = r < b.count ? T(1) : T(0);
  }

  void probabilities(const Block& b, int64_t begin, int64_t end, const Space& s) const {
    for_biases(b, begin, 0, end - begin, [&](int64_t k, Vec<T> bias) {
      T* row = s.tile + k * kRowBlock;
      for (int64_t j = 0; j < b.width; j += lanes<T>)
        store<T>(row + j, share<T>((load<T>(row + j) + bias) - load<T>(s.lse + j)));
    });
  }

  void gradients(const Range& range, const Part& part, const SoftAssignUpstream& u, const SoftAssignGradient& g,
                 const Space& s) const {
    const bool scores = g.rows.data || g.keys.data, one_tile = part.dots && words_ <= w_.plan.words;
    T* keys = place(g.keys, 0, range);
    T* bias = place(g.bias, size(g.keys), range);
    T* codebook = place(g.codebook, size(g.keys) + size(g.bias), range);
    if (part.sums) {
      if (keys) std::fill(keys + part.begin * e_, keys + part.end * e_, T(0));
      if (bias) std::fill(bias + part.begin, bias + part.end, T(0));
      if (codebook) std::fill(codebook + part.begin * l_, codebook + part.end * l_, T(0));
    }
    for_blocks(range, [&](const Block& b) {
      load_upstream(b, u, s);
      if (part.sums && codebook && u.hard.data) add_chosen(b, part, u, codebook, s);
      if (!u.lse.data) return;
      load_x(b, s);
      load_lse(u.lse, b, s);
      T* dots = static_cast<T*>(w_.dots) + range.book * n_ + b.row;
      std::fill(s.inverse, s.inverse + b.width, T(1));
      if (part.dots) {
        for (T* zero : {s.found, s.sum}) std::fill(zero, zero + b.width, T(0));
        for_chunks(words_, w_.plan.words, [&](int64_t begin, int64_t end) { weigh(b, begin, end, u, s); });
        normalize(b, u, s);
        if (w_.dots) std::copy(s.dot, s.dot + b.count, dots);
      } else if (scores) {
        std::fill(s.dot + b.count, s.dot + b.width, T(0));
        std::copy(dots, dots + b.count, s.dot);
      }
      for_chunks(part.end - part.begin, w_.plan.words, [&](int64_t at, int64_t last) {
        const int64_t begin = part.begin + at, end = part.begin + last, words = last - at;
        if (!one_tile && scores) weigh(b, begin, end, u, s);
        else if (!one_tile) weigh_words(b, begin, end, s);
        if (part.sums && codebook && u.soft.data)
          multiply(words, b.count, s.tile, kRowBlock, 1, s.g, padded<T>(l_), codebook + begin * l_, l_, l_, true);
        if (!scores) return;
        turn_into_slopes(b, words, s);
        if (part.sums && keys)
          multiply(words, b.count, s.slopes, kRowBlock, 1, s.x, padded<T>(e_), keys + begin * e_, e_, e_, true);
        if (part.sums && bias) add_row_sums(s.slopes, words, b.width, s.valid, bias + begin);
        if (!part.rows) return;
        if (p_.keys.data)
          multiply(e_, words, p_.keys.as<T>() + (b.book * words_ + begin) * e_, 1, e_, s.slopes, kRowBlock, s.out,
                   kRowBlock, b.width, at > 0);
        else store_slopes(b, begin, words, g.rows, s);
      });
      if (!part.rows || !p_.keys.data) return;
      transpose<false>(s.out, kRowBlock, padded<T>(e_), b.width, s.x, padded<T>(e_));
      store_rows(s.x, g.rows, b.book * e_, e_, b);
    });
  }

  // s.g: the rows of soft's gradient; s.g_turned: of what p' is the product with
  void load_upstream(const Block& b, const SoftAssignUpstream& u, const Space& s) const {
    const int64_t stride = padded<T>(l_);
    if (u.soft.data) {
      load_rows(u.soft, b.book * l_, l_, b, s.g);
      transpose<false>(s.g, stride, b.width, stride, s.g_turned, kRowBlock);
    }
    if (u.hard.data) {
      load_rows(u.hard, b.book * l_, l_, b, s.hard);
      if (u.straight_through && u.soft.data)
        transpose<true>(s.hard, stride, b.width, stride, s.g_turned, kRowBlock);
      else if (u.straight_through) transpose<false>(s.hard, stride, b.width, stride, s.g_turned, kRowBlock);
    }
    if (u.purity.data) load_column(u.purity, b, T(0), s.purity);
    else std::fill(s.purity, s.purity + b.width, T(0));
  }

  void add_chosen(const Block& b, const Part& part, const SoftAssignUpstream& u, T* codebook, const Space& s) const {
    for (int64_t r = 0; r < b.count; ++r) {
      const int64_t code = u.codes.as<int64_t>()[(b.row + r) * u.codes.stride + b.book];
      if (code < part.begin || code >= part.end) continue;
      const T* row = s.hard + r * padded<T>(l_);
      for (int64_t c = 0; c < l_; ++c) codebook[code * l_ + c] += row[c];
    }
  }

  // A rounded log-sum-exp makes a p whose sum is not 1 where scores are large, and b would not balance: dots are of p
  // over its sum, and so is, row by row, what p and b go into.
  void normalize(const Block& b, const SoftAssignUpstream& u, const Space& s) const {
    for (int64_t r = 0; r < b.width; ++r) {
      s.inverse[r] = r < b.count ? T(1) / s.sum[r] : T(0);
      s.dot[r] = s.found[r] * s.inverse[r];
    }
    if (!u.soft.data) return;
    for (int64_t r = 0; r < b.count; ++r)
      for (int64_t c = 0; c < l_; ++c) s.g[r * padded<T>(l_) + c] *= s.inverse[r];
  }

  // Tiles of p, and of p'; s.found grows by the sums of their products, s.sum by those of p.
  void weigh(const Block& b, int64_t begin, int64_t end, const SoftAssignUpstream& u, const Space& s) const {
    multiply_scores(b, begin, end, s);
    if (u.soft.data || (u.hard.data && u.straight_through))
      multiply(end - begin, l_, p_.codebook.as<T>() + (b.book * words_ + begin) * l_, l_, 1, s.g_turned, kRowBlock,
               s.slopes, kRowBlock, b.width, false);
    else std::fill(s.slopes, s.slopes + (end - begin) * kRowBlock, T(0));
    const T* usage = u.usage.data ? u.usage.as<T>() + b.book * words_ + begin : nullptr;
    in_runs<T>(end - begin, b.width, [&](int64_t from, int64_t to, auto group, int64_t j) {
      constexpr int G = decltype(group)::value;
      Vec<T> lse[G], purity[G], total[G], mass[G];
      for (int g = 0; g < G; ++g) {
        lse[g] = load<T>(s.lse + j + g * lanes<T>);
        purity[g] = T(2) * load<T>(s.purity + j + g * lanes<T>);
        total[g] = mass[g] = Vec<T>{};
      }
      for_biases(b, begin, from, to, [&](int64_t k, Vec<T> bias) {
        T *row = s.tile + k * kRowBlock + j, *slope = s.slopes + k * kRowBlock + j;
        const Vec<T> used = splat(usage ? usage[k] / T(n_) : T(0));
        for (int g = 0; g < G; ++g) {
          const Vec<T> p = share<T>((load<T>(row + g * lanes<T>) + bias) - lse[g]);
          const Vec<T> d = load<T>(slope + g * lanes<T>) + used + purity[g] * p;
          store<T>(row + g * lanes<T>, p);
          store<T>(slope + g * lanes<T>, d);
          total[g] += p * d;
          mass[g] += p;
        }
      });
      add_groups<T>(total, s.found + j);
      add_groups<T>(mass, s.sum + j);
    });
  }

  // The tile of p alone.
  void weigh_words(const Block& b, int64_t begin, int64_t end, const Space& s) const {
    multiply_scores(b, begin, end, s);
    probabilities(b, begin, end, s);
  }

  // p' becomes b = p (p' - sum over all words of p p'), with p over its sum.
  void turn_into_slopes(const Block& b, int64_t words, const Space& s) const {
    for (int64_t k = 0; k < words; ++k)
      for (int64_t j = 0; j < b.width; j += lanes<T>) {
        T* slope = s.slopes + k * kRowBlock + j;
        const Vec<T> p = load<T>(s.tile + k * kRowBlock + j) * load<T>(s.inverse + j);
        store<T>(slope, p * (load<T>(slope) - load<T>(s.dot + j)));
      }
  }

  void store_slopes(const Block& b, int64_t begin, int64_t words, const Array& to, const Space& s) const {
    for_chunks(words, kStrip, [&](int64_t at, int64_t last) {
      const int64_t cols = last - at, stride = padded<T>(cols);
      transpose<false>(s.slopes + at * kRowBlock, kRowBlock, stride, b.width, s.strip, stride);
      store_rows(s.strip, to, b.book * words_ + begin + at, cols, b);
    });
  }

  const SoftAssignWork& w_;
  const SoftAssignProblem& p_;
  const int64_t n_, books_, words_, e_, l_;
};

template <class T> int64_t thread_bytes(const SoftAssignWork& w) { return SoftAssign<T>(w).thread_bytes(); }
template <class T> void forward(const SoftAssignWork& w, const SoftAssignResult& r) { SoftAssign<T>(w).forward(r); }
template <class T> void backward(const SoftAssignWork& w, const SoftAssignUpstream& u, const SoftAssignGradient& g) {
  SoftAssign<T>(w).backward(u, g);
}

FASTRET_ISA_END

namespace fastret {
namespace FASTRET_ISA {
SoftAssignKernels soft_assign_kernels(bool doubles) {
  return doubles ? SoftAssignKernels{thread_bytes<double>, forward<double>, backward<double>}
                 : SoftAssignKernels{thread_bytes<float>, forward<float>, backward<float>};
}
}  // namespace FASTRET_ISA
}  // namespace fastret
