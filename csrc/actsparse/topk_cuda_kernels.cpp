// The table of this feature's kernels, each on the device of its tensors.
#include "actsparse/topk_cuda_kernels.h"

#include "actsparse/topk_launch.h"
#include "common/device.cuh"

namespace gossamer::actsparse::topk {
namespace {

void sum_bags(const CudaBags& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { sum_bags_cuda(args, s); });
}

void dot_rows(const CudaDots& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { dot_rows_cuda(args, s); });
}

void select(const CudaSelection& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { select_cuda(args, s); });
}

constexpr CudaKernels kKernels = {sum_bags, dot_rows, select};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::actsparse::topk
