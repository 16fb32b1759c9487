// What the extension can say of the machine it runs on.
#pragma once
#include <cstdint>
#include <string>

namespace fastret {
namespace cuda {

// Why no kernel can run, in the words of CUDA's runtime; empty: a device answers.
std::string device_error();

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
};

// Of the device that is current.
DeviceLimits device_limits();

#ifdef FASTRET_EMULATION
// The order in which threads and blocks run from now on: 0 ascending, 1 descending, else a seed to shuffle by.
void set_order(uint64_t order);
#endif

}  // namespace cuda
}  // namespace fastret
