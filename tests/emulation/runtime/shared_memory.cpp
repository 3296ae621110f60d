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
  poison(view_.data(), view_.size());
}

// ---- what other units of the processor see ------------------------------------------------------

void SharedMemory::make_view() {
  if (view_.empty()) view_.assign(size_, kPoison);
}

void SharedMemory::publish() {
  make_view();
  set_guards(false);
  std::memcpy(view_.data(), bytes_, size_);
  set_guards(true);
}

void SharedMemory::async_write(size_t offset, const void* from, size_t count) {
  make_view();
  std::memcpy(bytes_ + offset, from, count);
  std::memcpy(view_.data() + offset, from, count);
}

const unsigned char* SharedMemory::async_read(size_t offset, size_t count, const char* what,
                                              const Site& site) {
  make_view();
  check(bytes_ + offset, count, 1, what, site);
  if (std::memcmp(bytes_ + offset, view_.data() + offset, count) != 0) {
    fault(site, what, ": reads shared memory at offset ", offset,
          ", where a thread has stored something with no fence_proxy_async after it");
  }
  return bytes_ + offset;
}

// ---- guards -------------------------------------------------------------------------------------

void SharedMemory::guard(unsigned char* from, size_t count) {
  for (const Guard& known : guards_) {
    if (known.from == from) return;
  }
  guards_.push_back({from, count});
  set_guards(true);
}

void SharedMemory::set_guards(bool guarded) {
#if defined(__SANITIZE_ADDRESS__)
  for (const Guard& guard : guards_) {
    if (guarded) {
      __asan_poison_memory_region(guard.from, guard.count);
    } else {
      __asan_unpoison_memory_region(guard.from, guard.count);
    }
  }
#else
  (void)guarded;
#endif
}

void SharedMemory::lift_guards() {
  set_guards(false);
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
