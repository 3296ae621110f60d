#pragma once
// The launchers of the GEMM kernels; args.config says which one and how.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

void gemm_decode_sm80(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_prefill_sm80(const CudaGemmArgs& args, cudaStream_t stream);

inline void gemm_sm80(const CudaGemmArgs& args, cudaStream_t stream) {
  args.config.kernel == CudaKernel::kDecode ? gemm_decode_sm80(args, stream)
                                            : gemm_prefill_sm80(args, stream);
}

}  // namespace gossamer::sparse24
