#pragma once
// The GEMM kernels for NVIDIA GPUs, on the current device.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

// gemm_float32.cu; config as choose_float32_config (gemm_float32_config.h) gives it.
void gemm_float32(const CudaGemmArgs& args, cudaStream_t stream);

}  // namespace gossamer::sparse24
