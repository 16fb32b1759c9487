// What a kernel is written in, so that one .cu is compiled by nvcc for GPUs and by g++ for the emulation of
// csrc/emulation, which runs it in the test suite on machines without a GPU. With nvcc nothing here costs anything.
//
// How to add a kernel:
// 1. csrc/cuda/<op>.h declares what the host calls: arrays (csrc/common/array.h) and a stream. <op>.cu checks their
//    shapes and types, picks the instance and launches. The build finds the file; module.cpp binds the call.
// 2. Kernels take `Global<T>` (made by `global<T>(array, "name")`) for memory, `Global<const T>` where nobody writes
//    during the launch, and never a pointer. A view is indexed (x[i]), moved (x + i), loaded 16 bytes at a time
//    (load<N>(x, i)), and given to atomic_add(x + i, v) and the like.
// 3. Shared memory is declared in the kernel: FASTRET_SHARED(float, name, 256); of the size the launch gives:
//    FASTRET_DYNAMIC_SHARED(float, name), one a kernel, of which shared_part<T> takes pieces of other types. It is a
//    `Shared<float>` where it is passed on. More than 48 KiB are dynamic: launch() asks for them.
// 4. A value that is read has its type written down (`const float v = x[i]`), never auto.
// 5. device_check(condition) for what only the device can know: values of indices.
// 6. fastret/backends/cuda/<op>.py calls it through launch.py; tests/cuda/test_<op>.py runs it in the emulation, against
//    the reference, in several orders of threads; tests/cuda/test_sanitizers.py runs that again under sanitizers.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/array.h"
#include "../common/half.h"
#include "../common/host_device.h"

#ifdef __CUDACC__
#include <cassert>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../emulation/cuda.h"
#endif

namespace fastret {
namespace cuda {

constexpr int kWarpLanes = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr size_t kSharedUnasked = 48 << 10;  // what every block may have

// N values that are loaded as one.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

struct Shape {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  uintptr_t stream;
};

#ifdef __CUDACC__

// Memory of the device. The size and the name are the emulation's.
template <class T> class Global {
 public:
  using Type = T;
  Global() = default;
  __host__ __device__ Global(T* data, int64_t /*size*/, const char* /*name*/) : data_(data) {}
  __device__ T& operator[](int64_t i) const { return data_[i]; }
  __device__ Global operator+(int64_t i) const { return {data_ + i, 0, ""}; }
  __device__ explicit operator bool() const { return data_ != nullptr; }
  __device__ T* pointer() const { return data_; }

 private:
  T* data_ = nullptr;
};

template <class T> using Shared = T*;

#define FASTRET_SHARED(type, name, count)      \
  __shared__ alignas(16) type name##_[count];  \
  const ::fastret::cuda::Shared<type> name = name##_
#define FASTRET_DYNAMIC_SHARED(type, name)                 \
  extern __shared__ __align__(16) unsigned char dynamic_[]; \
  const ::fastret::cuda::Shared<type> name = reinterpret_cast<type*>(dynamic_)

// `count` elements of another type, from a byte of shared memory on.
template <class To, class T> __device__ Shared<To> shared_part(T* memory, int64_t byte, int64_t, const char*) {
  return reinterpret_cast<To*>(reinterpret_cast<unsigned char*>(memory) + byte);
}

// N elements from the i-th on, by the path for what nobody writes; 16 bytes of them must lie at a multiple of 16.
template <int N, class T> __device__ Pack<T, N> load(const Global<const T>& from, int64_t i) {
  constexpr int kBytes = sizeof(T) * N;
  using Narrow = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint64_t, Narrow>>;
  static_assert(sizeof(Word) == kBytes, "load 1, 2, 4, 8 or 16 bytes");
  const Word word = __ldg(reinterpret_cast<const Word*>(from.pointer() + i));
  Pack<T, N> values;
  memcpy(&values, &word, kBytes);
  return values;
}
template <int N, class T> __device__ Pack<T, N> load(Shared<T> from, int64_t i) {
  return *reinterpret_cast<const Pack<T, N>*>(from + i);
}

template <class T> __device__ T* pointer(const Global<T>& to) { return to.pointer(); }
template <class T> __device__ T* pointer(Shared<T> to) { return to; }
template <class To, class T> __device__ T atomic_add(const To& to, T v) { return atomicAdd(pointer(to), v); }
template <class To, class T> __device__ T atomic_min(const To& to, T v) { return atomicMin(pointer(to), v); }
template <class To, class T> __device__ T atomic_max(const To& to, T v) { return atomicMax(pointer(to), v); }
template <class To, class T> __device__ T atomic_cas(const To& to, T expected, T v) {
  return atomicCAS(pointer(to), expected, v);
}

__device__ inline float as_float(float v) { return v; }
__device__ inline float as_float(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float as_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }

__device__ inline void device_check(bool ok) { assert(ok); }

template <class... Parameters, class... Arguments>
void launch(const Shape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedUnasked)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<shape.grid, shape.block, shape.shared_bytes, reinterpret_cast<cudaStream_t>(shape.stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(shape.kernel) + ": " + cudaGetErrorString(error));
}

#else

template <class T> using Global = emulation::View<T>;
template <class T> using Shared = emulation::View<T>;

#define FASTRET_SHARED(type, name, count) \
  static const char name##_key = 0;       \
  const ::fastret::cuda::Shared<type> name = ::fastret::emulation::shared_array<type>(&name##_key, count, #name)
#define FASTRET_DYNAMIC_SHARED(type, name) \
  const ::fastret::cuda::Shared<type> name = ::fastret::emulation::dynamic_shared<type>(#name)

template <class To, class T>
Shared<To> shared_part(const Shared<T>& memory, int64_t byte, int64_t count, const char* name) {
  return memory.template part<To>(byte, count, name);
}

template <int N, class T> Pack<std::remove_const_t<T>, N> load(const emulation::View<T>& from, int64_t i) {
  Pack<std::remove_const_t<T>, N> values;
  __builtin_memcpy(&values, from.at(i, N, emulation::Access::read, alignof(decltype(values))), sizeof values);
  return values;
}

inline float as_float(float v) { return v; }
inline float as_float(BFloat16 v) { return widen(v); }
inline float as_float(Half v) { return widen(v); }

inline void device_check(bool ok, int line = __builtin_LINE()) {
  if (!ok) emulation::machine().fail("device_check in line " + std::to_string(line));
}

template <class... Parameters, class... Arguments>
void launch(const Shape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  emulation::machine().run({shape.kernel, shape.grid, shape.block, shape.shared_bytes},
                           [&] { kernel(arguments...); });
}

#endif

// A view of an array, whose shape and type have been checked.
template <class T> Global<T> global(const Array& a, const char* name) {
  return {a.as<T>(), a.empty() ? 0 : (a.rows - 1) * a.stride + a.cols, name};
}

}  // namespace cuda
}  // namespace fastret
