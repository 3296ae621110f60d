#pragma once
// The launchers of the products on a GPU. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream);
void conv_fma(const CudaConvArgs& args, cudaStream_t stream);
void conv_grouped(const CudaConvArgs& args, cudaStream_t stream);
// The sums of the weights' gradient over each segment, of which weight_grad_cuda makes the whole.
void sum_pairs_grouped(const CudaWeightGradArgs& args, cudaStream_t stream);
void weight_grad_cuda(const CudaWeightGradArgs& args, cudaStream_t stream);

inline void run_conv(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.config.kernel) {
    case CudaConvKernel::kMma: return conv_sm80(args, stream);
    case CudaConvKernel::kFma: return conv_fma(args, stream);
    case CudaConvKernel::kGrouped: return conv_grouped(args, stream);
  }
}

inline unsigned grid_of(const CudaConvArgs& args) {
  return static_cast<unsigned>(args.config.blocks(args.table.groups, args.c_out));
}

}  // namespace gossamer::pointcloud
