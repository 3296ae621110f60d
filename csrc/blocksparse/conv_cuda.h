#pragma once
// The launchers of the products on a GPU. Each runs what args.config says, on the current device.
#include "blocksparse/cuda.h"
#include "common/launch.cuh"

namespace gossamer::blocksparse {

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream);
void conv_fma(const CudaConvArgs& args, cudaStream_t stream);
void conv_sm90(const CudaConvArgs& args, cudaStream_t stream);

inline void run_conv(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.config.kernel) {
    case CudaConvKernel::kMma: return conv_sm80(args, stream);
    case CudaConvKernel::kFma: return conv_fma(args, stream);
    case CudaConvKernel::kWgmma: return conv_sm90(args, stream);
  }
}

}  // namespace gossamer::blocksparse
