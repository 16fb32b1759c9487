// What every byte of a launch's memory has seen: who wrote it last, who read it since, and whether a barrier stands
// between two accesses of which one writes. So a missing barrier is found in any order of threads, not only in one
// where the numbers come out wrong.
//
// Accesses are compared by epochs, as barriers count them: of one warp, ordered where a warp collective lies between;
// of one block, where a __syncthreads does; of different blocks, never. Nothing that is ordered is reported. What can
// be missed: a reader of whom two others hide, and collectives of a part of a warp, which count for all of it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace fastret {
namespace emulation {

enum class Access { read, write, atomic };

// Who does something, and when.
struct Stamp {
  int64_t block = -1;  // -1: nobody
  int32_t thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
  bool atomic = false;

  bool nobody() const { return block < 0; }
  bool same_thread(const Stamp& o) const { return block == o.block && thread == o.thread; }
};

inline bool ordered(const Stamp& before, const Stamp& now) {
  if (before.nobody() || before.same_thread(now)) return true;
  if (before.block != now.block) return false;
  if (before.block_epoch != now.block_epoch) return true;
  return before.thread / 32 == now.thread / 32 && before.warp_epoch != now.warp_epoch;
}

class Shadow {
 public:
  struct Race {
    Stamp other;
    const char* did = nullptr;  // nullptr: no race
  };

  void clear() { lines_.clear(), last_ = nullptr, last_line_ = 0; }

  // Whether all these bytes have been written since clear().
  bool written(const void* address, size_t bytes) {
    for (size_t b = 0; b < bytes; ++b)
      if (cell(address, b).write.nobody()) return false;
    return true;
  }

  Race touch(const void* address, size_t bytes, Access access, Stamp now) {
    now.atomic = access == Access::atomic;
    for (size_t b = 0; b < bytes; ++b) {
      Cell& c = cell(address, b);
      if (!(now.atomic && c.write.atomic) && !ordered(c.write, now)) return {c.write, "wrote"};
      if (access == Access::read) {
        if (!c.read.same_thread(now)) c.other_read = c.read;
        c.read = now;
        continue;
      }
      if (!ordered(c.read, now)) return {c.read, "read"};
      if (!ordered(c.other_read, now)) return {c.other_read, "read"};
      c.write = now;
    }
    return {};
  }

 private:
  struct Cell {
    Stamp write, read, other_read;
  };
  static constexpr uintptr_t kLine = 64;

  Cell& cell(const void* address, size_t offset) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address) + offset, line = a / kLine + 1;
    if (line != last_line_) {
      last_ = &lines_[line];
      last_line_ = line;
    }
    return (*last_)[a % kLine];
  }

  std::unordered_map<uintptr_t, std::array<Cell, kLine>> lines_;
  std::array<Cell, kLine>* last_ = nullptr;
  uintptr_t last_line_ = 0;
};

}  // namespace emulation
}  // namespace fastret
