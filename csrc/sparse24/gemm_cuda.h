#pragma once
// The launchers of the 2:4 products on a GPU. Each runs what args.config says, on the current
// device.
#include "common/launch.cuh"
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

void gemm_decode_sm80(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_prefill_sm80(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_int4_sm80(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_sm90(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_sm90_8bit(const CudaGemmArgs& args, cudaStream_t stream);  // its part for E4M3 and int8
void gemm_sm90_stream(const CudaGemmArgs& args, cudaStream_t stream);
void gemm_sm90_stream_8bit(const CudaGemmArgs& args, cudaStream_t stream);  // as above
void gemm_sm90_stream_int4(const CudaGemmArgs& args, cudaStream_t stream);  // of group > 0
void gemm_float32(const CudaGemmArgs& args, cudaStream_t stream);

inline void run_gemm(const CudaGemmArgs& args, cudaStream_t stream) {
  const bool is_stream = args.config.kernel == CudaKernel::kStream;
  if (args.group > 0) {
    return is_stream ? gemm_sm90_stream_int4(args, stream) : gemm_int4_sm80(args, stream);
  }
  switch (args.config.kernel) {
    case CudaKernel::kDecode: return gemm_decode_sm80(args, stream);
    case CudaKernel::kPrefill: return gemm_prefill_sm80(args, stream);
    case CudaKernel::kWgmma: return gemm_sm90(args, stream);
    case CudaKernel::kStream: return gemm_sm90_stream(args, stream);
    case CudaKernel::kFloat32: return gemm_float32(args, stream);
  }
}

}  // namespace gossamer::sparse24
