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

#ifdef FASTRET_EMULATION
void set_order(uint64_t order) { emulation::machine().set_order(order); }
#endif

}  // namespace cuda
}  // namespace fastret
