#include "device.h"

#include "portable.h"

namespace fastret {
namespace cuda {

std::string device_error() {
#ifdef __CUDACC__
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return "";
}

DeviceLimits device_limits() {
#ifdef __CUDACC__
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("device_limits: ") + cudaGetErrorString(error));
  return {multiprocessors, shared_bytes};
#else
  return {2, int64_t(emulation::kMostDynamic)};
#endif
}

#ifdef FASTRET_EMULATION
void set_order(uint64_t order) { emulation::machine().set_order(order); }
#endif

}  // namespace cuda
}  // namespace fastret
