#pragma once
// The launchers of the 2:4 GEMM on a GPU, one for each CudaKernel.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

// Many rows of x on Hopper (CudaKernel::kWgmma). Tiles (tile_n x tile_m): 128 x 256, 256 x 128 and
// 128 x 128. Needs no workspace and no counters.
void gemm_sm90(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_sm90_8bit(const CudaGemmArgs& args, cudaStream_t stream);  // its part for E4M3 and int8

}  // namespace gossamer::sparse24
