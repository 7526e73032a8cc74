// Stacks to switch between: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#define EMULATOR_PORTABLE_FIBERS 1
#endif

#if !defined(EMULATOR_PORTABLE_FIBERS)
// Saves the callee-saved registers and the stack pointer at *save, and resumes what was saved at `resume`.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* resume);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
#endif

namespace emulator {

// A stack with a function running on it. The function never returns: it ends by switching to another fiber.
class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  Fiber() {
    stack_ = static_cast<unsigned char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack_, kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch_in start `entry`.
  void prepare(void (*entry)()) {
#if defined(EMULATOR_PORTABLE_FIBERS)
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
#else
    // Below the entry address lie six saved registers; a function finds its return address at 8 modulo 16.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 72);
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
    inside_ = top - 7;
#endif
    reinterpret_cast<uint64_t*>(stack_)[0] = kCanary;
  }

  void switch_in() {
#if defined(EMULATOR_PORTABLE_FIBERS)
    swapcontext(&outside_, &inside_);
#else
    emulator_switch(&outside_, inside_);
#endif
  }

  void switch_out() {
#if defined(EMULATOR_PORTABLE_FIBERS)
    swapcontext(&inside_, &outside_);
#else
    emulator_switch(&inside_, outside_);
#endif
  }

  bool overflowed() const { return reinterpret_cast<const uint64_t*>(stack_)[0] != kCanary; }

 private:
  static constexpr uint64_t kCanary = 0x57ac6ca9a57ac6caull;
  unsigned char* stack_;
#if defined(EMULATOR_PORTABLE_FIBERS)
  ucontext_t inside_, outside_;
#else
  void* inside_;
  void* outside_;
#endif
};

}  // namespace emulator
