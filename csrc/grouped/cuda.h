#pragma once
// The products of experts for NVIDIA GPUs: what _C, which checks and decides, hands to the CUDA
// module. Of each expert, with its tokens' rows of x and dy:
//
//   kForward   y  [tokens, n]      act(x Wᵀ + b)
//   kInput     dx [tokens, k]      dy W
//   kWeight    dW [experts, n, k]  dyᵀ x
//
// Nobody reads the offsets back at a call, which would have to wait for the GPU: whatever they say,
// the kernels stay within their memory, and leave rows that no expert has as they are.
#include "common/activation.h"
#include "common/cuda.h"
#include "grouped/gemm_cuda_config.h"

namespace gossamer::grouped {

struct CudaGroupedArgs {
  DType dtype;  // bfloat16, float16, float32
  CudaProduct product;
  int64_t experts, tokens, n, k;
  const void* offsets;    // [experts], where each expert's tokens end
  bool wide_offsets;      // int64, or else int32
  const void* tokens_in;  // x, or dy of kInput and kWeight: its rows tokens_stride elements apart
  int64_t tokens_stride;
  const void* other;     // the weights [experts, n, k], or x of kWeight
  int64_t other_stride;  // between rows of x
  const void* bias;      // [experts, n] or null
  Activation activation;
  void* out;
  CudaGroupedConfig config;
};

// Asynchronous on the stream.
struct CudaKernels {
  void (*product)(const CudaGroupedArgs& args, CudaStream stream);
};

}  // namespace gossamer::grouped
