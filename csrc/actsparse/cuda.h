#pragma once
// The kernels for NVIDIA GPUs that skip zero activations: what _C, which checks and decides, hands
// to the CUDA module.
#include "actsparse/actsparse.h"
#include "actsparse/linear_cuda_config.h"
#include "common/cuda.h"

namespace gossamer::actsparse {

struct CudaLinearArgs {
  DType dtype;  // of all but spikes: bfloat16, float16, float32
  int64_t m, n, k;
  // [m, k], its rows x_stride elements apart; or spikes, as spikes.h packs them, where is_packed:
  // bytes, its rows x_stride bytes apart. Bits past k are not looked at.
  const void* x;
  int64_t x_stride;
  bool is_packed;
  const void* weight;  // [k, n], its rows weight_stride elements apart
  int64_t weight_stride;
  const void* bias;  // [n] or null
  float threshold;   // 0 or more, a value of the dtype
  Activation activation;
  void* out;  // [m, n]
  CudaLinearConfig config;
  float* workspace;   // config.workspace_bytes() of any content
  int32_t* counters;  // config.tiles() zeros, which the kernel leaves as zeros
};

struct CudaOutputsArgs {
  DType dtype;  // bfloat16, float16, float32
  int64_t m, n, k;
  const void* x;  // [m, k], its rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // [n, k], its rows weight_stride elements apart
  int64_t weight_stride;
  const void* bias;       // [n] or null
  const uint8_t* wanted;  // [m, n], zero where not
  Activation activation;
  void* out;       // [m, n]
  int64_t blocks;  // that the GPU runs at once
};

// Whether rows of x and of the weight come in whole pieces of 16 bytes.
inline bool are_aligned_outputs(const CudaOutputsArgs& args) {
  return is_aligned_weight(args.dtype, args.weight, args.weight_stride, args.k) &&
         (args.m == 1 ? reinterpret_cast<uintptr_t>(args.x) % 16 == 0
                      : is_aligned_weight(args.dtype, args.x, args.x_stride, args.k));
}

// All asynchronous on the stream.
struct CudaKernels {
  void (*linear)(const CudaLinearArgs& args, CudaStream stream);
  void (*outputs)(const CudaOutputsArgs& args, CudaStream stream);
};

}  // namespace gossamer::actsparse
