#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace gossamer {

// Memory that a thread keeps from call to call and for as long as it lives, so that a call
// allocates nothing in the steady state.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();  // before the larger one is there
      size_ = 0;
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
    }
    return memory_.get();
  }

  // Gives memory of more than so many bytes back: what only an unusual shape needs.
  void release_above(int64_t bytes) {
    if (size_ <= bytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace gossamer
