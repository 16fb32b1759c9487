// Which of a list belong together: a stable counting sort, of pairs by row or rows by segment.
#pragma once
#include <cstdint>

#include "array.h"
#include "buffer.h"

namespace fastret {

// What belongs to each group, in the order of the list: order[start[i]] to order[start[i + 1]], or start[i] to
// start[i + 1] themselves where the list is sorted by group and needs no order.
struct Groups {
  const int64_t *start = nullptr, *order = nullptr;
  int64_t item(int64_t k) const { return order ? order[k] : k; }
};

// Refuses an index that is not (1, count) int64, or has a value of `size` or above, or one below `least`.
void check_index(const Array& index, const char* name, int64_t count, int64_t size, int64_t least);

// Groups 0 to size - 1 of a checked index, in memory that the buffers keep; a negative value belongs to none.
Groups group(const Array& index, int64_t size, Buffer& starts, Buffer& orders);

}  // namespace fastret
