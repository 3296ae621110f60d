#pragma once
// The block-sparse kernels for NVIDIA GPUs: what _C, which checks and decides, hands to the CUDA
// module.
//
// Nobody reads the indices back at a call, which would have to wait for the GPU: they are checked
// where a weight is made or loaded, and whatever they say, the kernels stay within their memory.
#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_cuda_config.h"
#include "common/cuda.h"

namespace gossamer::blocksparse {

struct CudaConvArgs {
  ConvArgs conv;  // all pointers are to device memory; threads are not looked at
  CudaConvConfig config;
};

inline bool begins_at_16_bytes(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// All asynchronous on the stream.
struct CudaKernels {
  void (*conv)(const CudaConvArgs& args, CudaStream stream);
  // As in blocksparse.h.
  void (*find_live)(const void* dense, const Weight& shape, uint8_t* live, CudaStream stream);
  void (*gather)(const void* dense, const Weight& pattern, void* values, CudaStream stream);
  void (*to_dense)(const Weight& weight, void* dense, CudaStream stream);
};

}  // namespace gossamer::blocksparse
