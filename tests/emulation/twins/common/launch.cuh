#pragma once
// The host twin of csrc/common/launch.cuh.
#include <tuple>
#include <utility>

#include "runtime/launch.h"
#include "twins/warp.h"

namespace gossamer {

// `cluster` blocks in a row along x are one.
template <class... Parameters, class... Arguments>
void launch_cluster(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    size_t shared_bytes, cudaStream_t /*stream*/, Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  emulation::run_grid(
      cluster, grid, block, shared_bytes, [&] { std::apply(kernel, parameters); },
      emulation::Site::current());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  launch_cluster(1, kernel, grid, block, shared_bytes, stream,
                 std::forward<Arguments>(arguments)...);
}

template <class... Parameters>
int compiled_architecture(void (*)(Parameters...)) {
  return 90;  // the twins have every instruction
}

inline void fill_zero(void* global, size_t bytes, cudaStream_t /*stream*/) {
  std::memset(global, 0, bytes);
}

inline void copy_to_host(void* host, const void* global, size_t bytes, cudaStream_t /*stream*/) {
  std::memcpy(host, global, bytes);
}

template <class T>
T* shared_memory(emulation::Site site = emulation::Site::current()) {
  emulation::SharedMemory& shared = emulation::block->shared;
  if (sizeof(T) > shared.size()) {
    emulation::fault(site, "shared_memory: ", sizeof(T), " bytes, but the launch asked for ",
                     shared.size());
  }
  return reinterpret_cast<T*>(shared.begin());
}

// The same elements, and after them bytes that nobody may touch: AddressSanitizer reports an
// access, and without it the end of the block reports a write.
template <class T, int64_t Count, int Alignment = 16>
class SharedTile {
 public:
  T* data() {
    auto* end = reinterpret_cast<unsigned char*>(elements_ + Count);
    emulation::block->shared.guard(end, reinterpret_cast<unsigned char*>(this + 1) - end);
    return elements_;
  }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr size_t kGuardBytes = 64;
  alignas(Alignment) T elements_[Count];
  unsigned char guard_[kGuardBytes];
};

}  // namespace gossamer
