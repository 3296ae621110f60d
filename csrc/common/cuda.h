#pragma once
// The kernels for NVIDIA GPUs are in a module of their own, which hands them to _C as tables: the
// checks, the choices and the texts of errors exist once, in _C.
#include <cstddef>
#include <cstdint>

namespace gossamer {

namespace actsparse {
struct CudaKernels;
}
namespace actsparse::topk {
struct CudaKernels;
}
namespace blocksparse {
struct CudaKernels;
}
namespace grouped {
struct CudaKernels;
}
namespace pointcloud {
struct CudaKernels;
}
namespace sparse24 {
struct CudaKernels;
}

struct CudaDevice {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
  int64_t l2_bytes;
};

struct CudaStream {
  int device;
  void* stream;  // a cudaStream_t
};

struct CudaModule {
  // build_of_cuda() (cuda_build.h) where the module was compiled: both must be of one build.
  size_t build;
  // The kernels are emulated: what the CPU's tensors hold is their device memory.
  bool host_memory;
  CudaDevice (*device)(int index);
  // Which graph capture the stream is in; 0 outside one.
  uint64_t (*capture)(CudaStream stream);
  // From here on the calling thread may allocate while another one captures a graph, which CUDA
  // takes for a mistake otherwise.
  void (*relax_capture)();
  // Waits for what the stream has been given so far.
  void (*read)(void* host, const void* device, size_t bytes, CudaStream stream);
  const actsparse::CudaKernels* actsparse;
  const blocksparse::CudaKernels* blocksparse;
  const grouped::CudaKernels* grouped;
  const pointcloud::CudaKernels* pointcloud;
  const sparse24::CudaKernels* sparse24;
  const actsparse::topk::CudaKernels* topk;
};

}  // namespace gossamer
