#pragma once
// The launchers of the products on a GPU. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream);
void conv_fma(const CudaConvArgs& args, cudaStream_t stream);
void weight_grad_cuda(const CudaWeightGradArgs& args, cudaStream_t stream);

inline void run_conv(const CudaConvArgs& args, cudaStream_t stream) {
  args.config.kernel == CudaConvKernel::kMma ? conv_sm80(args, stream) : conv_fma(args, stream);
}

inline unsigned grid_of(const CudaConvArgs& args) {
  return static_cast<unsigned>(args.config.blocks(args.table.groups, args.c_out));
}

}  // namespace gossamer::pointcloud
