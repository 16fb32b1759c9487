// A head over rows and one over columns of the same logits, as CLIP has them: one exponential a pair serves both.
//
// With one reference c for a tile, e^(l_ij - c) is P_ij of row and column up to factors e^(c - lse_i), e^(c - lse_j),
// where no row and no column of the tile lies far below c; elsewhere each head goes by itself. P is then right to a few
// units in its last place, but for targets, where P - Y may be much smaller than P and is computed for itself.
#pragma once
#include <algorithm>
#include <cmath>

#include "masked_lse.h"
#include "pair_rows.h"

FASTRET_ISA_BEGIN

// A row whose sum is e^-40 of the tile's still has all terms down to e^-47 of its own as normal numbers.
constexpr double kNear = 40;

// Scores of a tile, padded to whole vectors.
template <class T> struct ScoreTile {
  T* scores;
  int64_t stride, row, rows, col, cols;
  Span span(int64_t r, int64_t first_column) const { return {row + r, col, cols, first_column}; }
  T* at(int64_t r) const { return scores + r * stride; }
};

// The log-sum-exp of all pairs, without biases, against targets at a few columns.
inline bool is_plain(const LseHead& h) {
  const PairMask& m = h.mask;
  const bool masked = m.same.row.data || m.different.row.data || m.distinct.row.data || m.has_offset || m.above.data ||
                      m.below.data;
  return h.reduce == Reduction::lse && !masked && !h.row_bias.data && !h.col_bias.data && !is_dense(h.target);
}

inline bool share_logits(const LseHead& rows, const LseHead& columns) {
  return !rows.column && columns.column && rows.scale == columns.scale && is_plain(rows) && is_plain(columns);
}

// What is added to the last vector of a row of logits: its padding counts nothing.
template <class T> Vec<T> padding(int64_t cols) {
  Vec<T> v{};
  for (int64_t j = cols % lanes<T>; j && j < lanes<T>; ++j) v[j] = kNothing<T>;
  return v;
}

// Logits of a row by vectors: visit(first column, logits), the padding at -inf.
template <class T, class Visit>
inline __attribute__((always_inline)) void for_logits(const T* scores, int64_t cols, T scale, Visit visit) {
  const int64_t whole = cols / lanes<T> * lanes<T>;
  for (int64_t j = 0; j < whole; j += lanes<T>) visit(j, rounded(load<T>(scores + j) * scale));
  if (whole < cols) visit(whole, rounded(load<T>(scores + whole) * scale) + padding<T>(cols));
}

template <class T> bool is_near(const T* values, int64_t n, T c) {
  bool near = true;
  for (int64_t i = 0; i < n; ++i) near &= std::abs(values[i] - c) < T(kNear);  // not of NaN
  return near;
}

// Sums of e^(l - c), with the largest logit of each, join those of the tiles before. Over e^(top - c), which rounds as
// that summand does, a logit that is far above the others counts exactly 1.
template <class T> void join(const LseHeadWork& h, int64_t first, int64_t n, const T* top, const T* sums, T c) {
  T *peak = static_cast<T*>(h.peak) + first, *total = static_cast<T*>(h.sum) + first;
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const Vec<T> old = load<T>(peak + i), high = load<T>(top + i), now = high > old ? high : old;
    const Vec<T> part = load<T>(sums + i) / exp_or_zero<T>(high - c);
    store<T>(total + i, load<T>(total + i) * exp_or_zero<T>(old - now) + part * exp_or_zero<T>(high - now));
    store<T>(peak + i, now);
  }
}

// Where in a workspace: largest logits and sums of the tile's rows and columns.
template <class T> struct BothAxes {
  T *row_top, *row_sum, *col_top, *col_sum;
};

// Adds a tile to both heads, or returns false and adds nothing.
template <class T>
bool reduce_both(const LseHeadWork& rows, const LseHeadWork& columns, const ScoreTile<T>& t, int64_t first_column,
                 const BothAxes<T>& to) {
  const T scale = T(rows.head->scale);
  const int64_t width = padded<T>(t.cols), height = padded<T>(t.rows);
  std::fill(to.col_top, to.col_top + width, kNothing<T>);
  std::fill(to.row_top, to.row_top + height, kNothing<T>);
  for (int64_t r = 0; r < t.rows; ++r) {
    Vec<T> top = splat(kNothing<T>);
    for_logits<T>(t.at(r), t.cols, scale, [&](int64_t j, Vec<T> l) {
      const Vec<T> column = load<T>(to.col_top + j);
      top = l > top ? l : top;
      store<T>(to.col_top + j, l > column ? l : column);
    });
    for (int k = 0; k < lanes<T>; ++k) to.row_top[r] = std::max(to.row_top[r], top[k]);
  }
  const T c = *std::max_element(to.row_top, to.row_top + t.rows);
  if (!is_near(to.row_top, t.rows, c) || !is_near(to.col_top, t.cols, c)) return false;

  std::fill(to.col_sum, to.col_sum + width, T(0));
  std::fill(to.row_sum, to.row_sum + height, T(0));
  for (int64_t r = 0; r < t.rows; ++r) {
    Vec<T> part{};
    for_logits<T>(t.at(r), t.cols, scale, [&](int64_t j, Vec<T> l) {
      const Vec<T> e = exp_or_zero<T>(l - c);
      part += e;
      store<T>(to.col_sum + j, load<T>(to.col_sum + j) + e);
    });
    to.row_sum[r] = sum<T>(part);
    const Span at = t.span(r, first_column);
    const T* s = t.at(r);
    visit_targets<T>(rows.head->target, at,
                     [&](int64_t j, double weight) { static_cast<T*>(rows.t)[at.i] += T(weight) * (s[j] * scale); });
    visit_targets<T>(columns.head->target, at, [&](int64_t j, double weight) {
      static_cast<T*>(columns.t)[at.col + j] += T(weight) * (s[j] * scale);
    });
  }
  join(rows, t.row, t.rows, to.row_top, to.row_sum, c);
  join(columns, t.col, t.cols, to.col_top, to.col_sum, c);
  return true;
}

// Upstream gradients of lse times e^(c - lse): P of a pair is that times e^(l - c).
template <class T> void factors(const LseHeadWork& h, int64_t first, int64_t n, T c, T* out) {
  const T *lse = static_cast<const T*>(h.lse) + first, *grad = static_cast<const T*>(h.grad_lse) + first;
  for (int64_t i = 0; i < n; i += lanes<T>) store<T>(out + i, load<T>(grad + i) * exp_or_zero<T>(c - load<T>(lse + i)));
  std::fill(out + n, out + padded<T>(n), T(0));
}

// Scores become dL / d score of both heads, or stay as they are where it returns false. row_factor: room for the tile's
// rows; column_factor, exact: for its columns.
template <class T>
bool weigh_both(const LseHeadWork& rows, const LseHeadWork& columns, const ScoreTile<T>& t, int64_t first_column,
                T* row_factor, T* column_factor, T* exact) {
  const T *row_lse = static_cast<const T*>(rows.lse) + t.row, *column_lse = static_cast<const T*>(columns.lse) + t.col;
  const T scale = T(rows.head->scale), c = *row_lse;
  if (!is_near(row_lse, t.rows, c) || !is_near(column_lse, t.cols, c)) return false;
  factors(rows, t.row, t.rows, c, row_factor);
  factors(columns, t.col, t.cols, c, column_factor);
  T *row_scale = static_cast<T*>(rows.scale_rows), *column_scale = static_cast<T*>(columns.scale_rows);
  const T *row_grad = static_cast<const T*>(rows.grad_lse) + t.row, *row_grad_t = static_cast<const T*>(rows.grad_t);
  const T *column_grad = static_cast<const T*>(columns.grad_lse) + t.col,
          *column_grad_t = static_cast<const T*>(columns.grad_t);
  for (int64_t r = 0; r < t.rows; ++r) {
    const Span at = t.span(r, first_column);
    T* s = t.at(r);
    const auto of_rows = [&](int64_t, double weight) { return T(weight) * row_grad_t[at.i]; };
    const auto of_columns = [&](int64_t j, double weight) { return T(weight) * column_grad_t[at.col + j]; };
    if (row_scale || column_scale) {
      Vec<T> by_row{}, by_column{};
      for_logits<T>(s, t.cols, scale, [&](int64_t j, Vec<T> l) {
        const Vec<T> part = exp_or_zero<T>(l - c) * load<T>(s + j);
        by_row += part;
        by_column += part * load<T>(column_factor + j);
      });
      T own = sum<T>(by_row) * row_factor[r], other = sum<T>(by_column);
      visit_targets<T>(rows.head->target, at, [&](int64_t j, double w) { own += of_rows(j, w) * s[j]; });
      visit_targets<T>(columns.head->target, at, [&](int64_t j, double w) { other += of_columns(j, w) * s[j]; });
      if (row_scale) row_scale[at.i] += own;
      if (column_scale) column_scale[at.i] += other;
    }
    const auto keep_exact = [&](int64_t j, double) {
      const T l = rounded(T(s[j] * scale));
      exact[j] = scale * (row_grad[r] * std::exp(l - row_lse[r]) + column_grad[j] * std::exp(l - column_lse[j]));
    };
    visit_targets<T>(rows.head->target, at, keep_exact);
    visit_targets<T>(columns.head->target, at, keep_exact);
    for_logits<T>(s, t.cols, scale, [&](int64_t j, Vec<T> l) {
      store<T>(s + j, exp_or_zero<T>(l - c) * (load<T>(column_factor + j) + row_factor[r]) * scale);
    });
    const auto take_exact = [&](int64_t j, double) { s[j] = exact[j]; };
    visit_targets<T>(rows.head->target, at, take_exact);
    visit_targets<T>(columns.head->target, at, take_exact);
    visit_targets<T>(rows.head->target, at, [&](int64_t j, double w) { s[j] += of_rows(j, w) * scale; });
    visit_targets<T>(columns.head->target, at, [&](int64_t j, double w) { s[j] += of_columns(j, w) * scale; });
  }
  return true;
}

FASTRET_ISA_END
