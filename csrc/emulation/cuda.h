// The part of CUDA C++ that the kernels use, for g++: keywords, thread indices, barriers, warp collectives, atomics.
// csrc/cuda/portable.h includes it where nvcc does not compile; how to add a kernel stands there.
//
// One rule is stricter than CUDA's: threads that have ended do not count as having come to a barrier. Atomics order
// nothing. __launch_bounds__ stands where g++ can keep no number: tests/cuda/emulation.py puts check_bounds into the
// kernel it belongs to. Not here, so that a kernel which uses them does not compile: textures, asynchronous copies,
// clusters, tensor cores, __activemask, fences. Nothing that blocks of one launch tell each other is ordered.
#pragma once
#include <cmath>

#include "view.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::fastret::emulation::machine().thread_index())
#define blockIdx (::fastret::emulation::machine().block_index())
#define blockDim (::fastret::emulation::machine().launch().block)
#define gridDim (::fastret::emulation::machine().launch().grid)

// ---- of a block. __builtin_LINE as a default argument is the line of the caller.
inline void __syncthreads(int line = __builtin_LINE()) {
  fastret::emulation::machine().block_barrier("__syncthreads", line, 0);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return fastret::emulation::machine().block_barrier("__syncthreads_count", line, predicate != 0);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return fastret::emulation::machine().block_barrier("__syncthreads_or", line, predicate != 0) != 0;
}

// ---- of a warp
inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  fastret::emulation::machine().warp_collective("__syncwarp", line, mask, 0);
}

namespace fastret {
namespace emulation {

// Every lane brings a value and takes that of lane `from`; of its own where `from` is no lane of its segment.
template <class T> T shuffle(const char* operation, int line, uint32_t mask, T value, int from, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Machine& m = machine();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = m.warp_collective(operation, line, mask, bits);
  const int segment = m.lane() / width * width;
  if (from < segment || from >= segment + width) from = m.lane();
  if (!(mask >> from & 1)) m.fail(std::string(operation) + ": takes from lane " + std::to_string(from) +
                                  ", which the mask leaves out");
  std::memcpy(&value, &all[from], sizeof value);
  return value;
}

inline uint32_t ballot(const char* operation, int line, uint32_t mask, bool predicate) {
  const uint64_t* all = machine().warp_collective(operation, line, mask, predicate);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= uint32_t(all[lane]) << lane;
  return votes & mask;
}

}  // namespace emulation
}  // namespace fastret

template <class T> T __shfl_sync(uint32_t mask, T v, int from, int width = 32, int line = __builtin_LINE()) {
  const int lane = fastret::emulation::machine().lane();
  return fastret::emulation::shuffle("__shfl_sync", line, mask, v, lane / width * width + from % width, width);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
  return fastret::emulation::shuffle("__shfl_xor_sync", line, mask, v, fastret::emulation::machine().lane() ^ bits,
                                     width);
}
template <class T> T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return fastret::emulation::shuffle("__shfl_up_sync", line, mask, v, fastret::emulation::machine().lane() - int(by),
                                     width);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return fastret::emulation::shuffle("__shfl_down_sync", line, mask, v, fastret::emulation::machine().lane() + int(by),
                                     width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastret::emulation::ballot("__ballot_sync", line, mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastret::emulation::ballot("__any_sync", line, mask, predicate != 0) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastret::emulation::ballot("__all_sync", line, mask, predicate == 0) == 0;
}
template <class T> uint32_t __match_any_sync(uint32_t mask, T value, int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = fastret::emulation::machine().warp_collective("__match_any_sync", line, mask, bits);
  uint32_t same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= uint32_t((mask >> lane & 1) && all[lane] == bits) << lane;
  return same;
}

// ---- of a thread
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
// NaN loses, whichever of the two it is: fmaxf, fminf
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }

// ---- atomics, of integers only: sums of floats would depend on the order of threads
namespace fastret {
namespace emulation {

template <class T, class Change> T atomic(const View<T>& to, Change change) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "atomics are of int, unsigned and unsigned long long");
  T* address = to.at(0, 1, Access::atomic);
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace emulation

template <class T> T atomic_add(const emulation::View<T>& to, T v) {
  return emulation::atomic(to, [&](T old) { return T(old + v); });
}
template <class T> T atomic_min(const emulation::View<T>& to, T v) {
  return emulation::atomic(to, [&](T old) { return old < v ? old : v; });
}
template <class T> T atomic_max(const emulation::View<T>& to, T v) {
  return emulation::atomic(to, [&](T old) { return old > v ? old : v; });
}
template <class T> T atomic_cas(const emulation::View<T>& to, T expected, T v) {
  return emulation::atomic(to, [&](T old) { return old == expected ? v : old; });
}

}  // namespace fastret
