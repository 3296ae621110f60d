#include "runtime/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__)
// Saves what a call must preserve on the stack that is left, and the stack pointer through the
// first argument; then the reverse on the stack that the second argument names. No code here
// changes the floating-point control words, so they need no saving.
asm(R"(
  .text
  .p2align 4
  .type gossamer_switch_stacks, @function
gossamer_switch_stacks:
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
  .size gossamer_switch_stacks, .-gossamer_switch_stacks
)");
extern "C" void gossamer_switch_stacks(void** save, void* load);
#endif

namespace gossamer::emulation {
namespace {

// Only pages that are touched take memory; AddressSanitizer, without optimisation, makes frames
// many times larger.
constexpr size_t kStackBytes = 2 << 20;

Fiber* entering = nullptr;  // for the first frame, which takes no argument

// A page without access below each stack turns an overflow into a crash at its line. Stacks are
// kept for the next launch: mapping one costs more than a small block takes to run.
std::vector<unsigned char*> free_stacks;

unsigned char* take_stack() {
  if (!free_stacks.empty()) {
    unsigned char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* mapped = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapped, guard, PROT_NONE);
  return static_cast<unsigned char*>(mapped) + guard;
}

void switch_context(Context& from, Context& to, bool leaving_for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &from.fake_stack, to.stack,
                                 to.stack_bytes);
#else
  (void)leaving_for_good;
#endif
#if defined(__x86_64__)
  gossamer_switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace

void Fiber::prepare(std::function<void()> body) {
  if (stack_ == nullptr) stack_ = take_stack();
  body_ = std::move(body);
  started_ = done_ = false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // what the last user's first frame left
#endif
  own_ = Context{};
  own_.stack = stack_;
  own_.stack_bytes = kStackBytes;
#if defined(__x86_64__)
  // As if `enter` had been called: six registers to pop, its address to return to, and above that
  // the null return address of a first frame, which also makes the stack aligned as after a call.
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  own_.stack_pointer = top;
#else
  getcontext(&own_.machine);
  own_.machine.uc_stack.ss_sp = stack_;
  own_.machine.uc_stack.ss_size = kStackBytes;
  own_.machine.uc_link = nullptr;
  makecontext(&own_.machine, &Fiber::enter, 0);
#endif
}

void Fiber::enter() {
  Fiber* self = entering;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->resumer_.stack, &self->resumer_.stack_bytes);
#endif
  self->body_();
  self->done_ = true;
  switch_context(self->own_, self->resumer_, true);
}

void Fiber::resume() {
  if (!started_) entering = this;
  started_ = true;
  switch_context(resumer_, own_, false);
}

void Fiber::suspend() { switch_context(own_, resumer_, false); }

Fiber::~Fiber() {
  if (stack_ != nullptr) free_stacks.push_back(stack_);
}

}  // namespace gossamer::emulation
