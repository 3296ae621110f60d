#pragma once
// The launchers of the products on a GPU. Each runs on the current device.
#include "common/launch.cuh"
#include "grouped/cuda.h"

namespace gossamer::grouped {

void gemm_sm80(const CudaGroupedArgs& args, cudaStream_t stream);
void gemm_fma(const CudaGroupedArgs& args, cudaStream_t stream);

inline void run_product(const CudaGroupedArgs& args, cudaStream_t stream) {
  args.config.kernel == CudaGroupedKernel::kMma ? gemm_sm80(args, stream) : gemm_fma(args, stream);
}

inline unsigned grid_of(const CudaGroupedArgs& args) {
  return static_cast<unsigned>(
      args.config.blocks(args.product, args.experts, args.tokens, args.n, args.k));
}

}  // namespace gossamer::grouped
