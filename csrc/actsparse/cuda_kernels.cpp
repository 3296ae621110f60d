// The table of this feature's kernels, each on the device of its tensors.
#include "actsparse/cuda_kernels.h"

#include "actsparse/linear_cuda.h"
#include "common/device.cuh"

namespace gossamer::actsparse {
namespace {

void linear(const CudaLinearArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { linear_cuda(args, s); });
}

void outputs(const CudaOutputsArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { outputs_cuda(args, s); });
}

constexpr CudaKernels kKernels = {linear, outputs};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::actsparse
