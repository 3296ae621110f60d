#include "runtime/shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace gossamer::emulation {

SharedMemory::SharedMemory(size_t bytes) : size_(bytes) {
  // Exactly `bytes` long, so that AddressSanitizer's redzone begins where the block's memory ends.
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  bytes_ = static_cast<unsigned char*>(memory);
}

SharedMemory::~SharedMemory() {
  lift_guards();
  std::free(bytes_);
}

size_t SharedMemory::check(const void* from, size_t count, size_t alignment, const char* what,
                           const Site& site) const {
  const ptrdiff_t offset = static_cast<const unsigned char*>(from) - bytes_;
  if (!contains(from, count)) {
    fault(site, what, ": ", count, " bytes at offset ", offset, " are outside the block's ", size_,
          " bytes of shared memory");
  }
  if (offset % static_cast<ptrdiff_t>(alignment) != 0) {
    fault(site, what, ": shared memory offset ", offset, " is not a multiple of ", alignment);
  }
  const auto* begin = static_cast<const unsigned char*>(from);
  for (const Guard& guard : guards_) {
    if (begin < guard.from + guard.count && guard.from < begin + count) {
      fault(site, what, ": ", count, " bytes at offset ", offset,
            " reach past the end of the shared tile that ends at ", guard.from - bytes_);
    }
  }
  return static_cast<size_t>(offset);
}

void SharedMemory::begin_block() {
  lift_guards();
  poison(bytes_, size_);
}

void SharedMemory::guard(unsigned char* from, size_t count) {
  for (const Guard& known : guards_) {
    if (known.from == from) return;
  }
  guards_.push_back({from, count});
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(from, count);
#endif
}

void SharedMemory::lift_guards() {
#if defined(__SANITIZE_ADDRESS__)
  for (const Guard& guard : guards_) __asan_unpoison_memory_region(guard.from, guard.count);
#endif
  guards_.clear();
}

void SharedMemory::end_block() {
  const std::vector<Guard> guards = guards_;
  lift_guards();
  for (const Guard& guard : guards) {
    for (size_t i = 0; i < guard.count; ++i) {
      if (guard.from[i] == kPoison) continue;
      fault(Site::current(), "a thread wrote past the end of the shared tile that ends at offset ",
            guard.from - bytes_, " (byte ", i, " after it)");
    }
  }
}

}  // namespace gossamer::emulation
