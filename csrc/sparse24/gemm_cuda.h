#pragma once
// The launchers of the 2:4 products on a GPU. Each runs what args.config says, on the current
// device.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

void gemm_sm80(const CudaGemmArgs& args, cudaStream_t stream);     // decode and prefill
void gemm_sm90(const CudaGemmArgs& args, cudaStream_t stream);     // wgmma
void gemm_float32(const CudaGemmArgs& args, cudaStream_t stream);  // float32

}  // namespace gossamer::sparse24
