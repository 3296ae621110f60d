// The table of this feature's kernels, each on the device of its tensors.
#include "blocksparse/cuda_kernels.h"

#include "blocksparse/conv_cuda.h"
#include "blocksparse/pack_cuda.h"
#include "common/device.cuh"

namespace gossamer::blocksparse {
namespace {

void conv(const CudaConvArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_conv(args, s); });
}

void find_live(const void* dense, const Weight& shape, uint8_t* live, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::find_live(dense, shape, live, s); });
}

void gather(const void* dense, const Weight& pattern, void* values, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::gather(dense, pattern, values, s); });
}

void to_dense(const Weight& weight, void* dense, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::to_dense(weight, dense, s); });
}

constexpr CudaKernels kKernels = {conv, find_live, gather, to_dense};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::blocksparse
