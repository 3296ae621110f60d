#pragma once
// The launchers of 2:4 convolutions on a GPU. Each runs what args.gemm.config says, on the current
// device.
#include "common/launch.cuh"
#include "sparse24/choose_conv_cuda.h"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream);
void conv_sm90(const CudaConvArgs& args, cudaStream_t stream);
void conv_sm90_stream(const CudaConvArgs& args, cudaStream_t stream);

inline void run_conv(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.gemm.config.kernel) {
    case CudaKernel::kWgmma: return conv_sm90(args, stream);
    case CudaKernel::kStream: return conv_sm90_stream(args, stream);
    default: return conv_sm80(args, stream);
  }
}

}  // namespace gossamer::sparse24
