// A query's vote needs no table of classes: its voters are sorted by class in shared memory, and where a class begins,
// one thread adds its weights in the order of the neighbours. A second sort brings the shares into order, the lower
// class first of equals. No atomic, and nothing of size Q x C: the same bits in every run, whatever the classes.
#include "knn_vote.h"

#include "bitonic.h"

namespace fastret {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostNeighbours = 2048;
constexpr float kTiny = 1.17549435e-38f;  // no vote at all: shares are 0
constexpr uint64_t kNobody = ~uint64_t(0);  // after everybody

// The sum of what the threads bring, the same bits for all of them.
__device__ inline float block_sum(float value, const Shared<float>& partial) {
  for (int bit = kWarpLanes / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kWholeWarp, value, bit);
  if (threadIdx.x % kWarpLanes == 0) partial[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) sum += partial[warp];
  return sum;
}

template <int kPlaces>
__global__ void __launch_bounds__(kThreads)
    vote(Global<const float> scores, int64_t scores_stride, Global<const int64_t> indices, int64_t indices_stride,
         int neighbours, Global<const int64_t> place, int64_t classes, float scale, Global<int64_t> winners,
         int64_t winners_stride, Global<float> shares, int64_t shares_stride, int64_t top) {
  FASTRET_SHARED(uint64_t, key, kPlaces);
  FASTRET_SHARED(uint64_t, ranking, kPlaces);  // key's successor: a class's votes, or share, where it begins
  FASTRET_SHARED(float, weight, kPlaces);
  FASTRET_SHARED(float, partial, kThreads / kWarpLanes);
  const int64_t q = blockIdx.x;
  const float nearest = scores[q * scores_stride];
  for (int p = threadIdx.x; p < kPlaces; p += kThreads) {
    uint64_t k = kNobody;
    if (p < neighbours) {
      const int64_t row = indices[q * indices_stride + p];
      if (row >= 0) {
        const int64_t c = place[row];
        device_check(c >= 0 && c < classes);
        k = uint64_t(c) << 32 | uint32_t(p);
        const float score = scores[q * scores_stride + p];
        weight[p] = expf((score - nearest) * scale);
      }
    }
    key[p] = k;
  }
  __syncthreads();
  bitonic_sort<kThreads, kPlaces>(key, threadIdx.x);

  float sum = 0;  // of the classes that begin in this thread's places
  for (int p = threadIdx.x; p < kPlaces; p += kThreads) {
    const uint64_t k = key[p], before = p == 0 ? kNobody : uint64_t(key[p - 1]);
    const bool begins = k != kNobody && k >> 32 != before >> 32;
    float votes = 0;
    for (int m = p; begins && m < kPlaces; ++m) {
      const uint64_t member = key[m];
      if (member >> 32 != k >> 32) break;
      const float w = weight[uint32_t(member)];
      votes += w;
    }
    ranking[p] = begins ? bits_of(votes) | k >> 32 << 32 : kNobody;
    sum += votes;
  }
  const float total = block_sum(sum, partial);

  // Shares are not negative: their bits ascend as they do.
  for (int p = threadIdx.x; p < kPlaces; p += kThreads) {
    const uint64_t k = ranking[p];
    const float share = float_from(uint32_t(k)) / (total < kTiny ? kTiny : total);  // max() would lose a NaN
    if (k != kNobody) ranking[p] = uint64_t(~bits_of(share)) << 32 | k >> 32;
  }
  __syncthreads();
  bitonic_sort<kThreads, kPlaces>(ranking, threadIdx.x);
  for (int64_t p = threadIdx.x; p < top; p += kThreads) {
    const uint64_t k = p < kPlaces ? uint64_t(ranking[p]) : kNobody;
    const float share = k == kNobody ? 0 : float_from(~uint32_t(k >> 32));
    winners[q * winners_stride + p] = share > 0 ? int64_t(uint32_t(k)) : -1;
    shares[q * shares_stride + p] = total == total ? share : total;  // NaN is nobody's, and everybody's share
  }
}

template <int kPlaces>
void launch_vote(const KnnVoteProblem& p, const Array& winners, const Array& shares, uintptr_t stream) {
  launch({"knn_vote", dim3(unsigned(p.scores.rows)), dim3(kThreads), 0, stream}, vote<kPlaces>,
         global<const float>(p.scores, "scores"), p.scores.stride, global<const int64_t>(p.indices, "indices"),
         p.indices.stride, int(p.scores.cols), global<const int64_t>(p.place, "place"), p.classes, float(p.scale),
         global<int64_t>(winners, "winners"), winners.stride, global<float>(shares, "shares"), shares.stride,
         winners.cols);
}

}  // namespace

void knn_vote(const KnnVoteProblem& p, const Array& winners, const Array& shares, uintptr_t stream) {
  const int64_t queries = p.scores.rows;
  check(p.scores, "scores", queries, p.scores.cols, DType::f32);
  check(p.indices, "indices", queries, p.scores.cols, DType::i64);
  check(p.place, "place", 1, p.place.cols, DType::i64);
  require(p.scores.cols >= 1 && p.scores.cols <= kMostNeighbours, "scores",
          "expected 1 to " + std::to_string(kMostNeighbours) + " neighbours on CUDA");
  require(p.classes >= 0 && p.classes <= int64_t(1) << 31, "classes", "expected at most 2^31");
  require(queries <= 0x7fffffff, "scores", "too many queries for one launch");
  check(winners, "winners", queries, winners.cols, DType::i64);
  check(shares, "shares", queries, winners.cols, DType::f32);
  if (winners.empty()) return;
  if (p.scores.cols <= 256) launch_vote<256>(p, winners, shares, stream);
  else launch_vote<kMostNeighbours>(p, winners, shares, stream);
}

}  // namespace cuda
}  // namespace fastret
