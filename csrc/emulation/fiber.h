// A fiber: a function on a stack of its own that runs until it pauses, and goes on when it is resumed.
//
// A stack is entered once through ucontext; from then on _setjmp and _longjmp switch, without the system call for the
// signal mask in swapcontext, which would be most of the time of a shuffle. AddressSanitizer follows neither by itself:
// it is told of every switch, and watches swapcontext, which is what switches there.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <memory>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#define FASTRET_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTRET_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef FASTRET_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastret {
namespace emulation {

class Fiber {
 public:
  using Body = void (*)(void*);

  // Makes the fiber ready to run body(argument) from its beginning; whatever it was in the middle of is forgotten.
  void start(Body body, void* argument) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    body_ = body;
    argument_ = argument;
    entered_ = false;
    getcontext(&fiber_);
    fiber_.uc_stack.ss_sp = stack_.get();
    fiber_.uc_stack.ss_size = kStackBytes;
    fiber_.uc_link = nullptr;
    makecontext(&fiber_, &Fiber::enter, 0);
  }

  // Called by the scheduler: runs the fiber until it pauses or its body returns. It must not throw.
  void resume() {
    running() = this;
#ifdef FASTRET_ADDRESS_SANITIZER
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    if (_setjmp(scheduler_) != 0) return;
    if (entered_) _longjmp(paused_, 1);
    entered_ = true;
    setcontext(&fiber_);
#endif
  }

  // Called in the fiber: back to the scheduler, until the next resume.
  void pause() {
#ifdef FASTRET_ADDRESS_SANITIZER
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack_, scheduler_bytes_);
    swapcontext(&fiber_, &scheduler_);
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_bytes_);
#else
    if (_setjmp(paused_) == 0) _longjmp(scheduler_, 1);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;

  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber& self = *running();
#ifdef FASTRET_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_bytes_);
#endif
    self.body_(self.argument_);
    self.pause();  // for good: nobody resumes a fiber whose body has returned
  }

  std::unique_ptr<char[]> stack_;
  Body body_ = nullptr;
  void* argument_ = nullptr;
  bool entered_ = false;
  ucontext_t fiber_;
#ifdef FASTRET_ADDRESS_SANITIZER
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
#else
  jmp_buf scheduler_, paused_;
#endif
};

}  // namespace emulation
}  // namespace fastret
