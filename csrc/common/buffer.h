// Uninitialised memory of one call, aligned to a cache line and freed with its owner.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastret {

class Buffer {
 public:
  explicit Buffer(int64_t bytes = 0)
      : data_(bytes > 0 ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr, std::free) {
    if (bytes > 0 && !data_) throw std::bad_alloc();
  }
  void* get() const { return data_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

}  // namespace fastret
