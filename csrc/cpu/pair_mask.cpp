#include "pair_mask.h"

namespace fastret {

void check_given(const Array& a, const std::string& name, int64_t cols, DType dtype) {
  if (a.data || a.rows) check(a, name.c_str(), 1, cols, dtype);
}

namespace {

void check_relation(const PairMask::Relation& r, const std::string& name, int64_t n, int64_t m) {
  require(!r.row.rows == !r.col.rows, name.c_str(), "needs labels of rows and of columns");
  check_given(r.row, name + "[0]", n, DType::i64);
  check_given(r.col, name + "[1]", m, DType::i64);
}

}  // namespace

void check_mask(const PairMask& mask, const std::string& name, int64_t n, int64_t m, DType real) {
  check_relation(mask.same, name + ".same", n, m);
  check_relation(mask.different, name + ".different", n, m);
  check_relation(mask.distinct, name + ".distinct", n, m);
  check_given(mask.above, name + ".above", n, real);
  check_given(mask.below, name + ".below", n, real);
  require(mask.period >= 0, (name + ".period").c_str(), "must not be negative");
}

}  // namespace fastret
