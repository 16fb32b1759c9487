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

// Ascending, kPlaces keys, a power of two; `thread` counts within the team, which must wait before it and need not after.
// from: stretches of from / 2 keys ascend and descend in turns already; with from = kPlaces one bitonic sequence is left.
template <int kTeam, int kPlaces>
__device__ void bitonic_sort(const Shared<uint64_t>& key, int thread, int from = 2) {
  for (int size = from; size <= kPlaces; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = thread; pair < kPlaces / 2; pair += kTeam) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const uint64_t a = key[low], b = key[high];
        if ((a > b) == ((low & size) == 0)) {
          key[low] = b;
          key[high] = a;
        }
      }
      team_wait<kTeam>();
    }
}

}  // namespace cuda
}  // namespace fastret
