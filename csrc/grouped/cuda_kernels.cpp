// The table of this feature's kernels, each on the device of its tensors.
#include "grouped/cuda_kernels.h"

#include "common/device.cuh"
#include "grouped/gemm_cuda.h"

namespace gossamer::grouped {
namespace {

void product(const CudaGroupedArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_product(args, s); });
}

constexpr CudaKernels kKernels = {product};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::grouped
