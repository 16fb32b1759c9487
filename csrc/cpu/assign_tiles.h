// What soft_assign.cpp does to one block of rows, or to one tile, that needs no more than these.
//
// A tile has a row of kRowBlock numbers a word, one for each row of the block, and lanes are rows. Of rows of features
// there are two forms: one row after another, padded to whole vectors, and turned, a row of kRowBlock numbers a feature.
#pragma once
#include <algorithm>
#include <type_traits>

#include "pack.h"
#include "pair_rows.h"
#include "soft_assign.h"

FASTRET_ISA_BEGIN

constexpr int64_t kRowBlock = AssignPlan::kRows;
constexpr int64_t kStrip = 32;  // words of logits that are turned at a time
constexpr int64_t kRun = 64;    // words whose statistics are summed before they join those of others
constexpr int kGroup = FASTRET_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of rows whose statistics registers hold

template <class T> using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// e^x of a score less what no score of its row exceeds by more than rounding; 0 below the normal numbers.
template <class T> inline Vec<T> share(Vec<T> x) {
  x *= T(kLog2e);
  const Vec<T> e = exp2_normal(x);
  return x < splat(sizeof(T) == 4 ? T(-126) : T(-1022)) ? Vec<T>{} : e;
}

// visit(how many vectors, first row): `width` rows, whole vectors, in groups.
template <class T, class Visit> void in_groups(int64_t width, Visit visit) {
  int64_t j = 0;
  for (; j + kGroup * lanes<T> <= width; j += kGroup * lanes<T>) visit(std::integral_constant<int, kGroup>(), j);
  for (; j < width; j += lanes<T>) visit(std::integral_constant<int, 1>(), j);
}

// out[k] += sum over rows of tile[k][row] * weights[row]
template <class T> void add_row_sums(const T* tile, int64_t words, int64_t width, const T* weights, T* out) {
  constexpr int64_t V = lanes<T>;
  alignas(64) T parts[V * V], turned[V * V];
  for (int64_t at = 0; at < words; at += V) {
    const int64_t count = std::min(V, words - at);
    for (int64_t k = 0; k < count; ++k) {
      Vec<T> part{};
      for (int64_t j = 0; j < width; j += V) part += load<T>(tile + (at + k) * kRowBlock + j) * load<T>(weights + j);
      store<T>(parts + k * V, part);
    }
    if (count < V) {
      for (int64_t k = 0; k < count; ++k) out[at + k] += sum<T>(load<T>(parts + k * V));
      continue;
    }
    transpose_block<T, false>(parts, V, turned, V);
    Vec<T> total = load<T>(out + at);
    for (int64_t r = 0; r < V; ++r) total += load<T>(turned + r * V);
    store<T>(out + at, total);
  }
}

// `count` rows; in whole vectors `width`.
struct AssignBlock {
  int64_t book, row, count, width;
};

// A thread's own memory, of which `bytes` are needed. Rows of features come one after another, and turned.
template <class T> struct AssignSpace {
  T *x, *x_turned, *g, *g_turned, *hard, *out, *strip;
  T *tile, *slopes;                                                     // scores, then p; p', then b
  T *top, *shift, *sum, *squares, *lse, *dot, *inverse, *found, *purity, *valid;  // of each row
  Word<T>* code;
  int64_t bytes = 0;

  AssignSpace(const SoftAssignWork& w, char* base) {
    const SoftAssignProblem& p = w.problem;
    const int64_t rows = kRowBlock, x_width = padded<T>(p.keys.data ? p.keys.cols : 0);
    const int64_t g_width = padded<T>(p.codebook.cols), tile_size = (w.plan.words + lanes<T>) * rows;
    auto take = [&](auto*& to, int64_t elements) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + bytes);
      bytes += (elements * int64_t(sizeof *to) + 63) / 64 * 64;
    };
    for (T** t : {&x, &x_turned}) take(*t, rows * x_width);
    for (T** t : {&g, &g_turned, &hard}) take(*t, rows * g_width);
    take(out, rows * std::max(x_width, g_width));
    take(strip, p.keys.data ? 0 : rows * kStrip);
    for (T** t : {&tile, &slopes}) take(*t, tile_size);
    for (T** t : {&top, &shift, &sum, &squares, &lse, &dot, &inverse, &found, &purity, &valid}) take(*t, rows);
    take(code, rows);
  }
};

// Columns [col, col + cols) of the block's rows, widened; zeros up to whole vectors of columns and of rows.
template <class T>
void load_rows(const Array& from, int64_t col, int64_t cols, const AssignBlock& b, T* rows) {
  const int64_t stride = padded<T>(cols);
  with_type<T>(from, [&](auto* data) {
    for (int64_t r = 0; r < b.count; ++r) {
      const auto* row = data + (b.row + r) * from.stride + col;
      T* to = rows + r * stride;
      for (int64_t c = 0; c < cols; ++c) to[c] = widen(row[c]);
      if (cols < stride) std::fill(to + cols, to + stride, T(0));
    }
  });
  std::fill(rows + b.count * stride, rows + b.width * stride, T(0));
}

template <class T>
void store_rows(const T* rows, const Array& to, int64_t col, int64_t cols, const AssignBlock& b) {
  with_type<T>(to, [&](auto* data) {
    for (int64_t r = 0; r < b.count; ++r)
      for (int64_t c = 0; c < cols; ++c)
        narrow(rows[r * padded<T>(cols) + c], data[(b.row + r) * to.stride + col + c]);
  });
}

// Of each row a number, and `other` for the rows that fill up the last vector.
template <class T> void load_column(const Array& from, const AssignBlock& b, T other, T* to) {
  for (int64_t r = 0; r < b.width; ++r)
    to[r] = r < b.count ? from.as<T>()[(b.row + r) * from.stride + b.book] : other;
}

template <class T> void scale(T* tile, int64_t count, int64_t width, const T* factors) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t j = 0; j < width; j += lanes<T>)
      store<T>(tile + k * kRowBlock + j, load<T>(tile + k * kRowBlock + j) * load<T>(factors + j));
}

// The tile's words in short runs: sums of the sums of runs lose fewer digits.
template <class T, class Visit> void in_runs(int64_t words, int64_t width, Visit visit) {
  for_chunks(words, kRun, [&](int64_t from, int64_t to) {
    in_groups<T>(width, [&](auto group, int64_t j) { visit(from, to, group, j); });
  });
}

template <class T, int G> void add_groups(const Vec<T> (&part)[G], T* to) {
  for (int g = 0; g < G; ++g) store<T>(to + g * lanes<T>, load<T>(to + g * lanes<T>) + part[g]);
}

FASTRET_ISA_END
