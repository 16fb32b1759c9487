// Which pairs of a pair matrix count, as every kernel with masks is told: csrc/cpu/pair_rows.h applies it to a row of a
// tile, csrc/cuda/topk.cu to a pair.
#pragma once
#include <string>

#include "array.h"

namespace fastret {

// Which pairs count: a conjunction of what is given (fastret/backends/pairs.py).
struct PairMask {
  struct Relation {
    Array row, col;  // int64 (1, N), (1, M); no data: no condition
  };
  Relation same, different, distinct;
  bool has_offset = false;
  int64_t offset = 0, period = 0;  // column != row + offset, modulo the period unless that is 0
  Array above, below;              // (1, N) bounds of the unscaled score
};

// A vector of one entry a column that may be left out.
inline void check_given(const Array& a, const std::string& name, int64_t cols, DType dtype) {
  if (a.data || a.rows) check(a, name.c_str(), 1, cols, dtype);
}

inline void check_relation(const PairMask::Relation& r, const std::string& name, int64_t n, int64_t m) {
  require(!r.row.rows == !r.col.rows, name.c_str(), "needs labels of rows and of columns");
  check_given(r.row, name + "[0]", n, DType::i64);
  check_given(r.col, name + "[1]", m, DType::i64);
}

// Refuses what does not fit n rows and m columns, with bounds of another type than `real`.
inline void check_mask(const PairMask& mask, const std::string& name, int64_t n, int64_t m, DType real) {
  check_relation(mask.same, name + ".same", n, m);
  check_relation(mask.different, name + ".different", n, m);
  check_relation(mask.distinct, name + ".distinct", n, m);
  check_given(mask.above, name + ".above", n, real);
  check_given(mask.below, name + ".below", n, real);
  require(mask.period >= 0, (name + ".period").c_str(), "must not be negative");
}

}  // namespace fastret
