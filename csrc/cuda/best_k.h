// The k best candidates of a few queries, found by a block that meets candidates in any order.
//
// A query has `places` kept ones, sorted, and as many for new ones, both in shared memory. Only what is better than the
// k-th so far is appended: a ballot, one atomic a warp, no sort. When new ones find no place, the block merges: a
// bitonic sort of the new ones, the greater of each pair of opposite ends, and the last stages of a sort of what is
// kept. A query of N candidates in random order appends about k (1 + ln(N / k)) of them.
#pragma once
#include "bitonic.h"
#include "candidate.h"

namespace fastret {
namespace cuda {

constexpr int kMostBest = 2048;

template <int kQueries, int kThreads> class BestK {
 public:
  // A power of two that holds k; at least two warps' candidates.
  static int places_for(int64_t k) {
    int places = 64;
    while (places < k) places *= 2;
    return places;
  }
  static size_t bytes(int places) { return kQueries * (2 * places * sizeof(uint64_t) + 16); }

  // In bytes(places) of shared memory from `offset` on, a multiple of 8. The block must wait before anything else.
  // Queries from `queries` on are nobody's and take no candidates.
  __device__ BestK(const Shared<float>& memory, int64_t offset, int places, int k, int queries)
      : places_(places), k_(k) {
    key_ = shared_part<uint64_t>(memory, offset, kQueries * 2 * places, "key");
    bound_ = shared_part<uint64_t>(memory, offset += kQueries * 2 * places * 8, kQueries, "bound");
    bound_score_ = shared_part<float>(memory, offset += kQueries * 8, kQueries, "bound_score");
    count_ = shared_part<int>(memory, offset += kQueries * 4, kQueries, "count");
    for (int p = threadIdx.x; p < kQueries * places; p += kThreads) kept(p) = kNoKey;
    if (threadIdx.x < kQueries) set_bound(threadIdx.x, int(threadIdx.x) < queries ? kWorstKey : ~uint64_t(0));
  }

  // Scores below it are not worth a key; NaN is not at least as great as any.
  __device__ float bound_score(int q) const { return bound_score_[q]; }

  // By a whole warp. True: this lane's key found no place and has to come again after merge().
  __device__ bool append(int q, uint64_t key, bool wants) const {
    const uint64_t bound = bound_[q];
    wants = wants && key > bound;
    const uint32_t votes = __ballot_sync(kWholeWarp, wants);
    if (votes == 0) return false;
    const int lane = threadIdx.x % kWarpLanes, leader = __ffs(int(votes)) - 1;
    int first = 0;
    if (lane == leader) first = atomic_add(count_ + q, __popc(votes));
    first = __shfl_sync(kWholeWarp, first, leader);
    const int place = first + __popc(votes & ((1u << lane) - 1));
    const bool fits = place < places_;
    if (wants && fits) put(q, place, key);
    return wants && !fits;
  }

  // By the whole block, which has waited since keys were appended, and waits again: what is new joins what is kept.
  __device__ void merge() const {
    for (int p = threadIdx.x; p < kQueries * places_; p += kThreads) {
      const int count = count_[p / places_];
      if (p % places_ >= count) fresh(p) = kNoKey;
    }
    __syncthreads();
    for (int size = 2; size <= places_; size *= 2)
      for (int stride = size / 2; stride > 0; stride /= 2) exchange(places_, stride, size);
    merge_sorted();
  }

  // The same where the new ones have been put in ascending order into all places, after which the block has waited.
  __device__ void merge_sorted() const {
    for (int p = threadIdx.x; p < kQueries * places_; p += kThreads) {
      const uint64_t a = kept(p), b = fresh(p);
      if (b > a) kept(p) = b;
    }
    __syncthreads();
    for (int stride = places_ / 2; stride > 0; stride /= 2) exchange(0, stride, 0);
    if (threadIdx.x < kQueries) {
      const uint64_t last = kept(threadIdx.x * places_ + k_ - 1), bound = bound_[threadIdx.x];
      set_bound(threadIdx.x, max(last, bound));
    }
    __syncthreads();
  }

  __device__ void put(int q, int place, uint64_t key) const { fresh(q * places_ + place) = key; }
  // kNoKey where there are fewer; after a merge.
  __device__ uint64_t best(int q, int place) const { return kept(q * places_ + place); }

 private:
  __device__ decltype(auto) kept(int p) const { return key_[p / places_ * 2 * places_ + p % places_]; }
  __device__ decltype(auto) fresh(int p) const { return key_[p / places_ * 2 * places_ + places_ + p % places_]; }

  __device__ void set_bound(int q, uint64_t bound) const {
    bound_[q] = bound;
    bound_score_[q] = score_of(bound);
    count_[q] = 0;
  }

  // A stage over the half of a query's keys that begins at `half`.
  __device__ void exchange(int half, int stride, int size) const {
    for (int pair = threadIdx.x; pair < kQueries * places_ / 2; pair += kThreads) {
      const int q = pair / (places_ / 2), within = pair % (places_ / 2);
      compare_exchange(key_ + (q * 2 * places_ + half), low_of(within, stride), stride, size);
    }
    __syncthreads();
  }

  Shared<uint64_t> key_, bound_;
  Shared<float> bound_score_;
  Shared<int> count_;
  int places_, k_;
};

}  // namespace cuda
}  // namespace fastret
