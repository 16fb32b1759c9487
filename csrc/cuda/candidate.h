// A candidate of a search for the best is one integer, as in csrc/cpu/candidates.h: score above, column below, greater
// where it is better; of equal scores the lowest column. That order is total: which thread met it when changes nothing.
#pragma once
#include "portable.h"

namespace fastret {
namespace cuda {

constexpr uint64_t kNoKey = 0;                         // below every candidate's
constexpr uint64_t kWorstKey = 0x007fffffffffffffull;  // a score of -inf: candidates are above

// Of a score that is not NaN. Both zeros are one score; negative ones turned over, all ascend.
FASTRET_HOST_DEVICE inline uint64_t key_of(float score, int64_t column) {
  uint32_t bits = score == 0 ? 0 : bits_of(score);
  bits ^= bits >> 31 ? ~uint32_t(0) : uint32_t(1) << 31;
  return uint64_t(bits) << 32 | uint32_t(~uint32_t(column));
}
FASTRET_HOST_DEVICE inline int64_t column_of(uint64_t key) { return uint32_t(~uint32_t(key)); }
FASTRET_HOST_DEVICE inline float score_of(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  return float_from(bits ^ (bits >> 31 ? uint32_t(1) << 31 : ~uint32_t(0)));
}

}  // namespace cuda
}  // namespace fastret
