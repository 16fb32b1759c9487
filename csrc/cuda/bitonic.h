// Sorting in shared memory, by a team of threads that is a warp or a whole block. Bitonic: who is compared does not
// depend on the keys.
#pragma once
#include "portable.h"

namespace fastret {
namespace cuda {

// Waits for the team: kTeam threads, a warp or the block.
template <int kTeam> __device__ void team_wait() {
  if constexpr (kTeam == kWarpLanes) __syncwarp();
  else __syncthreads();
}

// A pair of a stage of a bitonic network over a power of two of keys: the lower of its two places. Stretches of `size`
// places ascend where the bit `size` of a place is not set; size 0: all of them descend.
__device__ inline int low_of(int pair, int stride) { return 2 * pair - (pair & (stride - 1)); }
__device__ inline void compare_exchange(const Shared<uint64_t>& key, int low, int stride, int size) {
  const uint64_t a = key[low], b = key[low + stride];
  const bool ascending = size > 0 && (low & size) == 0;
  if ((a > b) == ascending) {
    key[low] = b;
    key[low + stride] = a;
  }
}

// Ascending, kPlaces keys, a power of two; `thread` counts within the team, which must wait before it and need not after.
// from: stretches of from / 2 keys ascend and descend in turns already; with from = kPlaces one bitonic sequence is left.
template <int kTeam, int kPlaces>
__device__ void bitonic_sort(const Shared<uint64_t>& key, int thread, int from = 2) {
  for (int size = from; size <= kPlaces; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < kPlaces / 2; pair += kTeam)
        compare_exchange(key, low_of(pair, stride), stride, size);
      team_wait<kTeam>();
    }
}

}  // namespace cuda
}  // namespace fastret
