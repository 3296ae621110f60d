#pragma once
// The dynamic shared memory of the block that is running. It starts as poison: every byte 0xCB,
// which is -2.7e7 as bfloat16 and float32, -15.6 as float16 and -53 as int8. Finite, because a NaN
// can slip through a comparison of maxima.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime/fault.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gossamer::emulation {

constexpr unsigned char kPoison = 0xCB;
inline void poison(void* bytes, size_t count) { std::memset(bytes, kPoison, count); }

class SharedMemory {
 public:
  static constexpr size_t kAlignment = 1024;  // what the strictest user, a 128-byte swizzle, needs

  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* begin() const { return bytes_; }
  size_t size() const { return size_; }
  bool contains(const void* from, size_t count = 1) const {
    const auto* p = static_cast<const unsigned char*>(from);
    return p >= bytes_ && count <= size_ && p - bytes_ <= static_cast<ptrdiff_t>(size_ - count);
  }
  // The offset of an operand of `what`, once it has been found to lie inside, aligned and in no
  // guard.
  size_t check(const void* from, size_t count, size_t alignment, const char* what,
               const Site& site) const;

  // TMA and wgmma reach shared memory by another way: they see what threads have stored there only
  // after publish(), the fence between the two.
  void publish();
  void async_write(size_t offset, const void* from, size_t count);
  const unsigned char* async_read(size_t offset, size_t count, const char* what, const Site& site);

  void begin_block();                             // poison everything
  void end_block();                               // throws if a guard was written to
  void guard(unsigned char* from, size_t count);  // bytes between tiles that nobody may touch

 private:
  struct Guard {
    unsigned char* from;
    size_t count;
  };
  void lift_guards();
  void set_guards(bool guarded);
  void make_view();

  unsigned char* bytes_;
  size_t size_;
  std::vector<Guard> guards_;
  std::vector<unsigned char> view_;  // what TMA and wgmma see; empty until they are used
};

}  // namespace gossamer::emulation
