// One row of a tile as a head of masked_lse sees it: logits, which pairs count, which are targets.
//
// Tiles and the vectors of LseHeadWork are padded to whole vectors: scores by 0, logits by -inf, weights by 0.
#pragma once
#include <algorithm>

#include "masked_lse.h"
#include "pack.h"
#include "simd.h"

FASTRET_ISA_BEGIN

constexpr double kLog2e = 1.4426950408889634;

template <class T> int64_t padded(int64_t n) { return (n + lanes<T> - 1) / lanes<T> * lanes<T>; }

// e^x for x that is not large; 0 below the normal numbers: what is masked counts nothing, and no product that follows
// meets a subnormal.
template <class T> Vec<T> exp_or_zero(Vec<T> x) {
  x *= T(kLog2e);
  const Vec<T> e = exp2(x);
  return x < splat(sizeof(T) == 4 ? T(-126) : T(-1022)) ? Vec<T>{} : e;
}

template <class T> T largest(const T* row, int64_t width) {
  Vec<T> top = splat(kNothing<T>);
  for (int64_t j = 0; j < width; j += lanes<T>) {
    const Vec<T> v = load<T>(row + j);
    top = v > top ? v : top;
  }
  T result = top[0];
  for (int k = 1; k < lanes<T>; ++k) result = top[k] > result ? top[k] : result;
  return result;
}

// One row of a tile: row i, columns [col, col + cols) of the pair matrix; the first row of y is column first_column of
// the whole one, which is what indices, offsets and periods count by.
struct Span {
  int64_t i, col, cols, first_column;
};

inline int64_t wrapped(int64_t index, int64_t period) {
  if (period == 0) return index;
  const int64_t rest = index % period;
  return rest < 0 ? rest + period : rest;
}

template <class T, class Keep>
void keep_where(const PairMask::Relation& r, const Span& at, T* row, T other, Keep keep) {
  if (!r.row.data) return;
  const int64_t own = r.row.as<int64_t>()[at.i], *labels = r.col.as<int64_t>() + at.col;
  for (int64_t j = 0; j < at.cols; ++j) row[j] = keep(labels[j], own) ? row[j] : other;
}

// row_j becomes `other` where the mask does not allow the pair
template <class T> void apply_mask(const PairMask& m, const Span& at, const T* scores, T other, T* row) {
  const auto equal = [](int64_t a, int64_t b) { return a == b; };
  const auto unequal = [](int64_t a, int64_t b) { return a != b; };
  keep_where(m.same, at, row, other, equal);
  keep_where(m.different, at, row, other, unequal);
  keep_where(m.distinct, at, row, other, unequal);
  if (m.has_offset) {
    const int64_t j = wrapped(at.i + m.offset, m.period) - at.first_column - at.col;
    if (j >= 0 && j < at.cols) row[j] = other;
  }
  if (m.above.data)
    for (int64_t j = 0; j < at.cols; ++j) row[j] = scores[j] > m.above.as<T>()[at.i] ? row[j] : other;
  if (m.below.data)
    for (int64_t j = 0; j < at.cols; ++j) row[j] = scores[j] < m.below.as<T>()[at.i] ? row[j] : other;
}

template <class T> void logits_of(const LseHeadWork& h, const Span& at, const T* scores, T* logits) {
  constexpr int64_t V = lanes<T>;
  const T scale = T(h.head->scale), bias = h.row_bias ? static_cast<const T*>(h.row_bias)[at.i] : T(0);
  const T* columns = static_cast<const T*>(h.col_bias);
  if (columns) {
    columns += at.col;
    for (int64_t j = 0; j < at.cols; j += V)
      store<T>(logits + j, load<T>(scores + j) * scale + (load<T>(columns + j) + bias));
  } else {
    for (int64_t j = 0; j < at.cols; j += V) store<T>(logits + j, load<T>(scores + j) * scale + bias);
  }
}

// The same with the padding: -inf for logits that are to be exponentials, 0 for what is to be summed.
template <class T>
void mask_logits(const PairMask& m, const Span& at, const T* scores, T* logits, T other = kNothing<T>) {
  apply_mask(m, at, scores, other, logits);
  for (int64_t j = at.cols; j < padded<T>(at.cols); ++j) logits[j] = other;
}

// Targets of a row that stand at a few columns: visit(column in the span, weight).
template <class T, class Visit> void visit_targets(const PairTarget& target, const Span& at, Visit visit) {
  const int64_t first = at.first_column + at.col;
  auto meet = [&](int64_t column, double weight) {
    if (column >= first && column < first + at.cols) visit(column - first, weight * target.factor);
  };
  if (target.kind == PairTarget::Kind::indexed) meet(target.index.as<int64_t>()[at.i], 1.0);
  if (target.kind == PairTarget::Kind::shifted)
    for (size_t k = 0; k < target.shifts.size(); ++k)
      meet(target.base + wrapped(at.i + target.shifts[k], target.period), target.weights[k]);
  if (target.kind != PairTarget::Kind::listed) return;
  const int64_t *index = target.index.as<int64_t>(), *offsets = target.offsets.as<int64_t>() + at.i;
  const int64_t* end = index + offsets[1];
  for (const int64_t* p = std::lower_bound(index + offsets[0], end, first); p < end && *p < first + at.cols; ++p)
    visit(*p - first, double(target.weight.as<T>()[p - index]) * target.factor);
}

inline bool is_dense(const PairTarget& t) {
  return t.kind == PairTarget::Kind::masked || t.kind == PairTarget::Kind::dense || t.uniform != 0;
}

// The rest of Y: one weight a column, where is_dense.
template <class T> void dense_targets(const PairTarget& target, const Span& at, const T* scores, T* weights) {
  std::fill(weights, weights + padded<T>(at.cols), T(0));
  const T factor = T(target.factor), uniform = T(target.uniform);
  if (target.kind == PairTarget::Kind::masked) {
    std::fill(weights, weights + at.cols, target.weight.as<T>()[at.i] * factor);
    apply_mask(target.mask, at, scores, T(0), weights);
  } else if (target.kind == PairTarget::Kind::dense) {
    const T* row = target.dense.as<T>() + at.i * target.dense.stride + at.col;
    for (int64_t j = 0; j < at.cols; ++j) weights[j] = row[j] * factor;
  }
  if (uniform != 0)
    for (int64_t j = 0; j < at.cols; ++j) weights[j] += uniform;
}

// Gradients of packed rows become gradients of the caller's rows, in the caller's type: rows [begin, end).
template <class T>
void deliver_rows(const Array& out, T* du, const T* u, const T* norms, bool normalize, int64_t begin, int64_t end) {
  const int64_t d = out.cols;
  for (int64_t p = begin; p < end; ++p) {
    T* row = du + p * d;
    if (normalize) project_row(row, u + p * d, norms[p], d);
    with_type<T>(out, [&](auto* data) {
      auto* to = data + p * out.stride;
      if (static_cast<void*>(to) == row) return;
      for (int64_t k = 0; k < d; ++k) narrow(row[k], to[k]);
    });
  }
}

FASTRET_ISA_END
