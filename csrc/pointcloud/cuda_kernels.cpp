// The table of this feature's kernels, each on the device of its tensors.
#include "pointcloud/cuda_kernels.h"

#include "common/device.cuh"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/maps_cuda.h"

namespace gossamer::pointcloud {
namespace {

void conv(const CudaConvArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_conv(args, s); });
}

void weight_grad(const CudaWeightGradArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { weight_grad_cuda(args, s); });
}

void number(const WindowKeys& window, const NumberedRows& rows, bool walkers, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { number_rows(window, rows, walkers, s); });
}

void search(const CudaSearchArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { search_pairs(args, s); });
}

void outputs(const CudaOutputsArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { find_outputs(args, s); });
}

void cells(const CudaCells& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cells_of_keys(args, s); });
}

constexpr CudaKernels kKernels = {conv, weight_grad, number, search, outputs, cells};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::pointcloud
