#include "groups.h"

#include <algorithm>
#include <vector>

namespace fastret {

void check_index(const Array& index, const char* name, int64_t count, int64_t size, int64_t least) {
  check(index, name, 1, count, DType::i64);
  const int64_t* values = index.as<int64_t>();
  bool inside = true;
  for (int64_t p = 0; p < count; ++p) inside &= values[p] >= least && values[p] < size;
  require(inside, name, "expected numbers from 0 to " + std::to_string(size - 1));
}

Groups group(const Array& index, int64_t size, Buffer& starts, Buffer& orders) {
  const int64_t count = index.cols, *key = index.as<int64_t>();
  starts = Buffer((size + 1) * int64_t(sizeof(int64_t)));
  int64_t* start = static_cast<int64_t*>(starts.get());
  std::fill(start, start + size + 1, int64_t(0));
  bool sorted = true;
  for (int64_t p = 0; p < count; ++p) {
    ++start[std::max<int64_t>(key[p], -1) + 1];  // those of no group stand first
    sorted &= p == 0 || key[p - 1] <= key[p];
  }
  for (int64_t i = 0; i < size; ++i) start[i + 1] += start[i];
  if (sorted) return {start, nullptr};
  orders = Buffer(count * int64_t(sizeof(int64_t)));
  int64_t* order = static_cast<int64_t*>(orders.get());
  std::vector<int64_t> next(start, start + size);
  for (int64_t p = 0; p < count; ++p)
    if (key[p] >= 0) order[next[key[p]]++] = p;
  return {start, order};
}

}  // namespace fastret
