// Small kernels for tests of the emulation itself: each with a mistake, and the same without it. nvcc compiles them too.
#include "../../csrc/cuda/portable.h"

namespace planted {

using namespace fastret;
using namespace fastret::cuda;

constexpr int kThreads = 96;

// out[block] = sum of the block's stretch of x
template <bool Broken> __global__ void missing_barrier(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, partial, kThreads / kWarpLanes);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[blockIdx.x * n + i];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, bit);
  if (threadIdx.x % kWarpLanes == 0) partial[threadIdx.x / kWarpLanes] = sum;
  if (!Broken) __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0;
  for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) total += partial[warp];
  out[blockIdx.x] = total;
}

// A slot is used again while others may still be reading it.
template <bool Broken> __global__ void missing_barrier_before_reuse(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, slot, 1);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!Broken) __syncthreads();
    if (threadIdx.x == 0) slot[0] = x[blockIdx.x * n + i];
    __syncthreads();
    const float v = slot[0];
    sum += v;
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <bool Broken> __global__ void missing_warp_barrier(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, mine, kThreads);
  mine[threadIdx.x] = threadIdx.x < n ? float(x[blockIdx.x * n + threadIdx.x]) : 0.0f;
  if (!Broken) __syncwarp();
  const float next = mine[threadIdx.x ^ 1];
  if (threadIdx.x == 0) out[blockIdx.x] = next;
}

template <bool Broken> __global__ void out_of_bounds(Global<const float> x, Global<float> out, int64_t n) {
  if (threadIdx.x == 5) out[blockIdx.x] = x[blockIdx.x * n + (Broken ? n : n - 1)];
}

template <bool Broken> __global__ void out_of_bounds_write(Global<const float> x, Global<float> out, int64_t n) {
  const Global<float> mine = out + blockIdx.x;
  if (threadIdx.x == 0) mine[Broken ? -1 : 0] = x[blockIdx.x * n];
}

template <bool Broken> __global__ void out_of_shared(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, row, kThreads);
  const int to = threadIdx.x + (Broken ? 1 : 0);
  row[to] = x[blockIdx.x * n];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = row[kThreads - 1];
}

template <bool Broken> __global__ void divergent_barrier(Global<const float> x, Global<float> out, int64_t n) {
  if (!Broken || threadIdx.x < 64) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = x[blockIdx.x * n];
}

template <bool Broken> __global__ void two_barriers(Global<const float> x, Global<float> out, int64_t n) {
  if (Broken && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (!Broken) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = x[blockIdx.x * n];
}

template <bool Broken> __global__ void divergent_shuffle(Global<const float> x, Global<float> out, int64_t n) {
  float v = x[blockIdx.x * n];
  if (!Broken || threadIdx.x % kWarpLanes < 8) v += __shfl_xor_sync(kWholeWarp, v, 4);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = v;
}

template <bool Broken> __global__ void narrow_mask(Global<const float> x, Global<float> out, int64_t n) {
  float v = x[blockIdx.x * n];
  v += __shfl_xor_sync(Broken ? 0xffffu : kWholeWarp, v, 1);
  if (threadIdx.x == 0) out[blockIdx.x] = v;
}

template <bool Broken> __global__ void uninitialised(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, row, kThreads);
  if (!Broken || threadIdx.x != 7) row[threadIdx.x] = x[blockIdx.x * n];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = row[7];
}

template <bool Broken> __global__ void misaligned(Global<const float> x, Global<float> out, int64_t n) {
  const Pack<float, 4> v = load<4>(x, Broken ? 1 : 0);
  if (threadIdx.x == 0) out[blockIdx.x] = v.item[3] + float(n);
}

template <bool Broken> __global__ void one_place_for_all_blocks(Global<const float> x, Global<float> out, int64_t n) {
  if (threadIdx.x == 0) out[Broken ? 0 : blockIdx.x] = x[blockIdx.x * n];
}

template <bool Broken> __global__ void failed_check(Global<const float> x, Global<float> out, int64_t n) {
  device_check(!Broken || threadIdx.x != 40);
  if (threadIdx.x == 0) out[blockIdx.x] = x[blockIdx.x * n];
}

// Beside what the launch asks for, one float a thread.
template <bool Broken> __global__ void too_much_shared(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_SHARED(float, row, 12288 - kThreads + (Broken ? 1 : 0));
  row[threadIdx.x] = x[blockIdx.x * n];
  if (threadIdx.x == 0) out[blockIdx.x] = row[0];
}

template <bool Broken>
__global__ void __launch_bounds__(Broken ? kThreads - 1 : kThreads, 1)
    too_many_threads(Global<const float> x, Global<float> out, int64_t n) {
  if (threadIdx.x == 0) out[blockIdx.x] = x[blockIdx.x * n];
}

// Of dynamic shared memory, where the launch asks for one float a thread.
template <bool Broken> __global__ void beyond_what_was_asked(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_DYNAMIC_SHARED(float, row);
  row[threadIdx.x + (Broken ? 1 : 0)] = x[blockIdx.x * n];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = row[kThreads - 1];
}

template <bool Broken> __global__ void part_of_what_was_asked(Global<const float> x, Global<float> out, int64_t n) {
  FASTRET_DYNAMIC_SHARED(float, row);
  const Shared<float> last = shared_part<float>(row, (kThreads - 1) * sizeof(float), Broken ? 2 : 1, "last");
  if (threadIdx.x == 0) last[0] = x[blockIdx.x * n];
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = last[0];
}

// Mistakes beside the views, which only sanitizers see.
template <bool Broken> __global__ void beyond_a_local_array(Global<const float> x, Global<float> out, int64_t n) {
  float local[4] = {1, 2, 3, 4};
  float* first = local;
  first[Broken ? n % 4 + 4 : n % 4] = x[0];
  if (threadIdx.x == 0) out[blockIdx.x] = local[(n + 1) % 4];
}

template <bool Broken> __global__ void shift_too_far(Global<const float> x, Global<float> out, int64_t n) {
  if (threadIdx.x == 0) out[blockIdx.x] = x[0] + float(1 << (Broken ? int(n) : int(n % 4)));
}

// Which ticket each thread drew, of all blocks.
__global__ void tickets(Global<int> counter, Global<int> out) {
  for (int turn = 0; turn < 2; ++turn) {
    const int ticket = atomic_add(counter + 0, 1);
    out[(blockIdx.x * 2 + turn) * kThreads + threadIdx.x] = ticket;
    __syncthreads();
  }
}

// One warp; every collective and atomic, 16 results a lane.
__global__ void collectives(Global<const int> in, Global<int> count, Global<int> out) {
  FASTRET_SHARED(int, counter, 1);
  const int lane = threadIdx.x, v = in[lane];
  const Global<int> mine = out + lane * 16;
  mine[0] = __shfl_sync(kWholeWarp, v, 3);
  mine[1] = __shfl_sync(kWholeWarp, v, 1, 8);
  mine[2] = __shfl_xor_sync(kWholeWarp, v, 5);
  mine[3] = __shfl_up_sync(kWholeWarp, v, 2u);
  mine[4] = __shfl_down_sync(kWholeWarp, v, 2u, 16);
  mine[5] = int(__ballot_sync(kWholeWarp, v % 3 == 0));
  mine[6] = __any_sync(kWholeWarp, v == 7) * 2 + __any_sync(kWholeWarp, v == -1);
  mine[7] = __all_sync(kWholeWarp, v >= 0) * 2 + __all_sync(kWholeWarp, v == 7);
  mine[8] = int(__match_any_sync(kWholeWarp, v % 4));
  mine[9] = __syncthreads_count(v % 5 == 0);
  mine[10] = __syncthreads_or(v == 9) * 2 + __syncthreads_or(v == 99);
  const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
  mine[11] = int(__ballot_sync(half, v & 1));
  if (lane == 0) counter[0] = 0;
  __syncthreads();
  atomic_add(counter + 0, v);
  atomic_max(count + 0, v);
  atomic_min(count + 1, v);
  atomic_cas(count + 2, 0, 5);
  __syncthreads();
  mine[12] = counter[0];
  mine[13] = __popc(uint32_t(v));
  mine[14] = __ffs(v);
  mine[15] = __clz(v);
}

// One thread: the larger and the smaller of a pair of floats, and of the pair turned around.
__global__ void extremes(Global<const float> in, Global<float> out) {
  const float a = in[0], b = in[1];
  out[0] = max(a, b);
  out[1] = max(b, a);
  out[2] = min(a, b);
  out[3] = min(b, a);
}

}  // namespace planted

using namespace planted;

#ifndef __CUDACC__
#include <map>

namespace {

using Kernel = void (*)(Global<const float>, Global<float>, int64_t);
#define PLANTED(name) {#name, {name<false>, name<true>}}
const std::map<std::string, std::pair<Kernel, Kernel>> kernels{
    PLANTED(missing_barrier), PLANTED(missing_barrier_before_reuse), PLANTED(missing_warp_barrier),
    PLANTED(out_of_bounds),   PLANTED(out_of_bounds_write),          PLANTED(out_of_shared),
    PLANTED(divergent_barrier), PLANTED(two_barriers),               PLANTED(divergent_shuffle),
    PLANTED(narrow_mask),     PLANTED(uninitialised),                PLANTED(misaligned),
    PLANTED(one_place_for_all_blocks), PLANTED(failed_check),        PLANTED(too_much_shared),
    PLANTED(too_many_threads), PLANTED(beyond_what_was_asked),       PLANTED(part_of_what_was_asked),
    PLANTED(beyond_a_local_array),      PLANTED(shift_too_far)};

// What the emulation says of a run; null: nothing.
template <class Run> const char* complaint(Run run) {
  static std::string said;
  try {
    run();
  } catch (const emulation::Fault& fault) {
    said = fault.what();
    return said.c_str();
  }
  return nullptr;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* run_planted(const char* name, int broken, uint64_t order, float* x, float* out, int64_t blocks,
                               int64_t n) {
  const auto& [right, wrong] = kernels.at(name);
  emulation::machine().set_order(order);
  return complaint([&, right = right, wrong = wrong] {
    launch({name, dim3(unsigned(blocks)), dim3(kThreads), kThreads * sizeof(float), 0}, broken ? wrong : right,
           Global<const float>(x, blocks * n, "x"), Global<float>(out, blocks, "out"), n);
  });
}

// A launch that asks for so many bytes of shared memory, of a kernel that needs none.
EXPORT const char* run_asking(int64_t bytes, float* x, float* out) {
  return complaint([&] {
    launch({"too_many_threads", dim3(1), dim3(kThreads), size_t(bytes), 0}, too_many_threads<false>,
           Global<const float>(x, 1, "x"), Global<float>(out, 1, "out"), int64_t(1));
  });
}

EXPORT const char* run_tickets(uint64_t order, int* counter, int* out, int64_t blocks) {
  emulation::machine().set_order(order);
  return complaint([&] {
    launch({"tickets", dim3(unsigned(blocks)), dim3(kThreads), 0, 0}, tickets, Global<int>(counter, 1, "counter"),
           Global<int>(out, blocks * 2 * kThreads, "out"));
  });
}

EXPORT const char* run_collectives(uint64_t order, int* in, int* count, int* out) {
  emulation::machine().set_order(order);
  return complaint([&] {
    launch({"collectives", dim3(1), dim3(kWarpLanes), 0, 0}, collectives, Global<const int>(in, 32, "in"),
           Global<int>(count, 3, "count"), Global<int>(out, 32 * 16, "out"));
  });
}

EXPORT const char* run_extremes(float* in, float* out) {
  return complaint([&] {
    launch({"extremes", dim3(1), dim3(1), 0, 0}, extremes, Global<const float>(in, 2, "in"),
           Global<float>(out, 4, "out"));
  });
}
#else
// Instances, so that nvcc compiles them.
#define INSTANCE(name) \
  template __global__ void planted::name<false>(Global<const float>, Global<float>, int64_t)
INSTANCE(missing_barrier);
INSTANCE(missing_warp_barrier);
INSTANCE(misaligned);
INSTANCE(too_many_threads);
#endif
