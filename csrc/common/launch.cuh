#pragma once
// What a CUDA file needs around its kernels: the launch itself, and typed dynamic shared memory.
// With these instead of <<<>>> and __shared__, a kernel file is also plain C++: the tests compile
// it for the host, against tests/emulation/twins/common/launch.cuh.
#include <cuda_runtime.h>

#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

// A failed call of the CUDA runtime becomes a RuntimeError with the call and CUDA's reason. CUDA
// forgets it, or the next launch, which asks for the last error, would be blamed for it.
#define GOSSAMER_CUDA_CHECK(call)                                                      \
  do {                                                                                 \
    const cudaError_t status_ = (call);                                                \
    if (status_ != cudaSuccess) {                                                      \
      cudaGetLastError();                                                              \
      throw std::runtime_error(std::string(#call ": ") + cudaGetErrorString(status_)); \
    }                                                                                  \
  } while (false)

namespace gossamer {

// Shared memory beyond this has to be asked for, kernel by kernel.
constexpr size_t kDefaultSharedBytes = 48 << 10;

// Allows a kernel all the shared memory that the current device has. Not what one launch needs: the
// limit belongs to the kernel, and a smaller launch by another thread would lower it between this
// and a larger launch, which would then fail.
inline void allow_shared_memory(const void* kernel) {
  thread_local std::set<std::pair<const void*, int>> allowed;
  int device, most;
  GOSSAMER_CUDA_CHECK(cudaGetDevice(&device));
  if (allowed.count({kernel, device}) != 0) return;
  GOSSAMER_CUDA_CHECK(
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  GOSSAMER_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert({kernel, device});
}

// Blocks `cluster` at a time along x, of which the grid has a multiple, run together.
template <class... Parameters, class... Arguments>
void launch_cluster(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  GOSSAMER_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  launch_cluster(1, kernel, grid, block, shared_bytes, stream,
                 std::forward<Arguments>(arguments)...);
}

// The architecture, as 10 * major + minor, that the code of this kernel which the current device
// runs was compiled for.
template <class... Parameters>
int compiled_architecture(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  GOSSAMER_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion;
}

inline void fill_zero(void* global, size_t bytes, cudaStream_t stream) {
  GOSSAMER_CUDA_CHECK(cudaMemsetAsync(global, 0, bytes, stream));
}

// Waits for what the stream has been given so far.
inline void copy_to_host(void* host, const void* global, size_t bytes, cudaStream_t stream) {
  GOSSAMER_CUDA_CHECK(cudaMemcpyAsync(host, global, bytes, cudaMemcpyDeviceToHost, stream));
  GOSSAMER_CUDA_CHECK(cudaStreamSynchronize(stream));
}

// The block's dynamic shared memory, which the launch sizes as sizeof(T) or as an array of T.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char gossamer_dynamic_shared_memory[];
  return reinterpret_cast<T*>(gossamer_dynamic_shared_memory);
}

// A tile in shared memory, as a member of the struct that shared_memory() returns. On the host the
// emulation guards the bytes after each tile, so its size there is larger: always use sizeof.
template <class T, int64_t Count, int Alignment = 16>
class SharedTile {
 public:
  __device__ T* data() { return elements_; }
  __device__ T& operator[](int64_t i) { return elements_[i]; }

 private:
  alignas(Alignment) T elements_[Count];
};

}  // namespace gossamer
