// Which pairs of a pair matrix count, as every kernel with masks is told. pair_rows.h applies it to a row of a tile.
#pragma once
#include <string>

#include "../common/array.h"

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

// Refuses what does not fit n rows and m columns, with bounds of another type than `real`.
void check_mask(const PairMask&, const std::string& name, int64_t n, int64_t m, DType real);

// A vector of one entry a column that may be left out.
void check_given(const Array&, const std::string& name, int64_t cols, DType);

}  // namespace fastret
