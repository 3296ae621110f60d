// The table of this feature's kernels, each on the device of its tensors.
#include "pointcloud/cuda_kernels.h"

#include "common/device.cuh"
#include "pointcloud/conv_cuda.h"

namespace gossamer::pointcloud {
namespace {

void conv(const CudaConvArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_conv(args, s); });
}

void weight_grad(const CudaWeightGradArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { weight_grad_cuda(args, s); });
}

constexpr CudaKernels kKernels = {conv, weight_grad};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::pointcloud
