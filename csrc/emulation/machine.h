// Runs a launch on the host: one block at a time, its threads as fibers on one thread of the system, switched where
// they wait for each other. What a GPU would answer with a hang, garbage or nothing at all is a Fault with a message.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "shadow.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastret {
namespace emulation {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;  // of dynamic shared memory
};

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;    // what a block may have without asking for more
constexpr size_t kMostDynamic = 227 << 10;  // what it may have where the launch asks, which launch() does above 48 KiB

class Machine {
 public:
  // 0: threads and blocks ascending, 1: descending, else a seed: shuffled anew after every wait, and warps held back.
  void set_order(uint64_t order) { order_ = order; }

  void run(const Launch& launch, const std::function<void()>& body) {
    launch_ = launch;
    body_ = &body;
    count_ = int(launch.block.x * launch.block.y * launch.block.z);
    current_ = -1;
    const auto refuse = [&](const std::string& what) {
      throw Fault("kernel " + std::string(launch.kernel) + ": " + what);
    };
    if (count_ < 1 || count_ > kMostThreads) refuse("a block of " + std::to_string(count_) + " threads");
    if (launch.grid.x < 1 || launch.grid.y < 1 || launch.grid.z < 1) refuse("an empty grid");
    if (launch.shared_bytes > kMostDynamic)
      refuse(std::to_string(launch.shared_bytes) + " bytes of dynamic shared memory, of at most " +
             std::to_string(kMostDynamic));
    if (launch.grid.x > 0x7fffffff || launch.grid.y > 65535 || launch.grid.z > 65535) refuse("too large a grid");
    random_.seed(order_);
    global_.clear();
    std::vector<int64_t> blocks(int64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    arrange(blocks);
    for (const int64_t b : blocks) run_block(b);
  }

  const Launch& launch() const { return launch_; }
  dim3 block_index() const {
    const dim3& g = launch_.grid;
    return dim3(unsigned(block_ % g.x), unsigned(block_ / g.x % g.y), unsigned(block_ / g.x / g.y));
  }
  dim3 thread_index() const {
    const dim3& b = launch_.block;
    return dim3(current_ % b.x, current_ / b.x % b.y, current_ / (b.x * b.y));
  }
  int lane() const { return current_ % kWarp; }

  // What __launch_bounds__ promises the compiler, which a GPU refuses to launch without.
  void check_bounds(int threads) const {
    if (count_ > threads)
      fail("a block of " + std::to_string(count_) + " threads, of at most " + std::to_string(threads) +
           " by __launch_bounds__");
  }

  // ---- what a thread does

  [[noreturn]] void fail(const std::string& what) const {
    throw Fault("kernel " + std::string(launch_.kernel) + ", block " + text(block_index()) + ", thread " +
                text(thread_index()) + ": " + what);
  }

  // Waits for every thread of the block; the sum of what they bring.
  int block_barrier(const char* operation, int line, int value) {
    Thread& t = threads_[current_];
    t.value = value;
    wait(Wait::block, operation, line);
    return block_sum_;
  }

  // Waits for every lane of the mask; what each of them brings.
  const uint64_t* warp_collective(const char* operation, int line, uint32_t mask, uint64_t bits) {
    if (!(mask >> lane() & 1)) fail(std::string(operation) + ": the mask leaves out the calling lane");
    Thread& t = threads_[current_];
    t.mask = mask;
    t.sent = bits;
    wait(Wait::warp, operation, line);
    return t.received;
  }

  void touch(const void* address, size_t bytes, Access access, bool shared, const char* name, int64_t element) {
    Shadow& shadow = shared ? shared_ : global_;
    if (shared && access != Access::write && !shadow.written(address, bytes))
      fail("reads element " + std::to_string(element) + " of shared " + name + ", which nobody has written");
    const Stamp now{block_, current_, block_epoch_, warp_epoch_[current_ / kWarp]};
    const Shadow::Race race = shadow.touch(address, bytes, access, now);
    if (race.did)
      fail(std::string(access == Access::read ? "reads" : "writes") + " element " + std::to_string(element) + " of " +
           name + ", which thread " + std::to_string(race.other.thread) + " of block " +
           std::to_string(race.other.block) + " " + race.did + ", without a barrier between them");
  }

  // The block's memory for a __shared__ array, one for each key; filled with NaN, or -1. What the launch asked for is
  // counted from the beginning.
  void* shared(const void* key, size_t bytes, const char* name, bool asked = false) {
    for (const SharedArray& a : shared_arrays_)
      if (a.key == key) return a.bytes.get();
    shared_used_ += asked ? 0 : bytes;
    const size_t most = launch_.shared_bytes > kMostShared ? kMostDynamic : kMostShared;
    if (shared_used_ > most)
      fail(std::string("shared ") + name + ": the block has " + std::to_string(shared_used_) + " bytes, of at most " +
           std::to_string(most));
    shared_arrays_.push_back({key, std::unique_ptr<char[], Free>(static_cast<char*>(std::aligned_alloc(
                                       kAlignment, (bytes + kAlignment) / kAlignment * kAlignment)))});
    std::memset(shared_arrays_.back().bytes.get(), 0xff, bytes);
    return shared_arrays_.back().bytes.get();
  }

 private:
  enum class Wait { none, block, warp, ended };

  struct Thread {
    Fiber fiber;
    Wait wait = Wait::none;
    const char* operation = "";
    int line = 0, value = 0;
    uint32_t mask = 0;
    uint64_t sent = 0, received[kWarp] = {};
  };

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr size_t kAlignment = 128;
  struct SharedArray {
    const void* key;
    std::unique_ptr<char[], Free> bytes;
  };

  static std::string text(const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  }

  bool shuffled() const { return order_ > 1; }
  template <class T> void arrange(std::vector<T>& order) {
    if (order_ == 1) std::reverse(order.begin(), order.end());
    if (shuffled()) std::shuffle(order.begin(), order.end(), random_);
  }

  void wait(Wait what, const char* operation, int line) {
    Thread& t = threads_[current_];
    t.wait = what;
    t.operation = operation;
    t.line = line;
    t.fiber.pause();
  }

  static void thread_main(void* machine) {
    Machine& m = *static_cast<Machine*>(machine);
    try {
      (*m.body_)();
    } catch (...) {  // must not leave the fiber; other threads of the block are abandoned where they wait
      m.error_ = std::current_exception();
    }
    m.threads_[m.current_].wait = Wait::ended;
  }

  void run_block(int64_t block) {
    block_ = block;
    block_epoch_ = 0;
    warp_epoch_.assign((count_ + kWarp - 1) / kWarp, 0);
    shared_.clear();
    shared_arrays_.clear();
    shared_used_ = launch_.shared_bytes;
    error_ = nullptr;
    while (int(threads_.size()) < count_) threads_.emplace_back();
    for (int t = 0; t < count_; ++t) {
      threads_[t].wait = Wait::none;
      threads_[t].fiber.start(&Machine::thread_main, this);
    }
    std::vector<int> order(count_);
    std::iota(order.begin(), order.end(), 0);
    arrange(order);
    for (;;) {
      step(order);
      const auto ended = [](const Thread& t) { return t.wait == Wait::ended; };
      if (std::all_of(threads_.begin(), threads_.begin() + count_, ended)) return;
      release();
    }
  }

  // Runs every thread that can until it waits; where the order is shuffled, some warps stay behind.
  void step(std::vector<int>& order) {
    bool ran = false;
    do {
      if (shuffled()) arrange(order);
      uint64_t held_back = shuffled() ? random_() : 0;
      for (const int t : order) {
        if (threads_[t].wait != Wait::none || (held_back >> t / kWarp & 1)) continue;
        ran = true;
        current_ = t;
        threads_[t].fiber.resume();
        if (error_) std::rethrow_exception(error_);
      }
    } while (!ran && any(Wait::none));
  }

  bool any(Wait wait) const {
    for (int t = 0; t < count_; ++t)
      if (threads_[t].wait == wait) return true;
    return false;
  }

  void release() {
    bool released = false;
    for (int t = 0; t < count_; ++t)
      if (threads_[t].wait == Wait::warp) released |= release_lanes(t);
    if (released || any(Wait::none)) return;
    release_block();
  }

  // Lets the lanes go that thread t waits for, if they all have come to the same collective with the same mask.
  bool release_lanes(int t) {
    const Thread& first = threads_[t];
    const int begin = t / kWarp * kWarp, end = std::min(count_, begin + kWarp);
    uint64_t sent[kWarp] = {};
    for (int other = begin; other < end; ++other) {
      if (!(first.mask >> (other - begin) & 1)) continue;
      const Thread& o = threads_[other];
      if (o.wait != Wait::warp || o.mask != first.mask || std::strcmp(o.operation, first.operation) != 0) return false;
      sent[other - begin] = o.sent;
    }
    const uint32_t mask = first.mask;
    for (int other = begin; other < end; ++other) {
      if (!(mask >> (other - begin) & 1)) continue;
      std::memcpy(threads_[other].received, sent, sizeof sent);
      threads_[other].wait = Wait::none;
    }
    ++warp_epoch_[t / kWarp];
    return true;
  }

  void release_block() {
    int waiting = 0;
    while (threads_[waiting].wait == Wait::ended) ++waiting;
    const Thread& first = threads_[waiting];
    int sum = 0;
    for (int t = 0; t < count_; ++t) {
      const Thread& o = threads_[t];
      if (first.wait != Wait::block || o.wait != Wait::block || o.line != first.line ||
          std::strcmp(o.operation, first.operation) != 0)
        diverged(waiting);
      sum += o.value;
    }
    block_sum_ = sum;
    ++block_epoch_;
    for (int t = 0; t < count_; ++t) threads_[t].wait = Wait::none;
  }

  // Nobody can go on: says for whom thread t waits in vain.
  [[noreturn]] void diverged(int t) {
    const Thread& first = threads_[t];
    current_ = t;
    for (int other = 0; other < count_; ++other) {
      const Thread& o = threads_[other];
      const bool awaited =
          first.wait == Wait::block || (other / kWarp == t / kWarp && (first.mask >> other % kWarp & 1));
      const bool same = o.wait == first.wait && std::strcmp(o.operation, first.operation) == 0 &&
                        (first.wait == Wait::block ? o.line == first.line : o.mask == first.mask);
      if (!awaited || same) continue;
      current_ = other;
      const std::string who = text(thread_index());
      current_ = t;
      fail(std::string("divergence: waits at ") + first.operation + " in line " + std::to_string(first.line) +
           " for thread " + who +
           (o.wait == Wait::ended ? ", which has ended"
                                  : std::string(", which waits at ") + o.operation + " in line " +
                                        std::to_string(o.line)));
    }
    fail(std::string("divergence: waits at ") + first.operation + " in line " + std::to_string(first.line));
  }

  uint64_t order_ = 0;
  std::mt19937_64 random_;
  Launch launch_{};
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::deque<Thread> threads_;  // kept from launch to launch, for their stacks
  int count_ = 0, current_ = -1;
  int64_t block_ = 0;
  int block_sum_ = 0;
  uint32_t block_epoch_ = 0;
  std::vector<uint32_t> warp_epoch_;
  Shadow global_, shared_;
  std::vector<SharedArray> shared_arrays_;
  size_t shared_used_ = 0;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

}  // namespace emulation
}  // namespace fastret
