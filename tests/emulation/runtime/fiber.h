#pragma once
// A fiber: a call that can be left in the middle and resumed there, on a stack of its own. All
// fibers of a launch share one OS thread, so every run can be repeated exactly.
#include <cstddef>
#include <functional>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace gossamer::emulation {

// What is needed to go on where somebody left off, and what AddressSanitizer wants to know of the
// stack: without it, it takes the switch for a stack overflow.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

class Fiber {
 public:
  // `body` runs on the first resume; it must not throw.
  void prepare(std::function<void()> body);
  void resume();   // the caller's side: returns when the fiber suspends or ends
  void suspend();  // the fiber's side: returns at the next resume
  bool started() const { return started_; }
  bool done() const { return done_; }

  ~Fiber();
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

 private:
  static void enter();  // the first frame of every fiber

  Context own_, resumer_;
  std::function<void()> body_;
  unsigned char* stack_ = nullptr;
  bool started_ = false, done_ = false;
};

}  // namespace gossamer::emulation
