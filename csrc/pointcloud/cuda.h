#pragma once
// The point-cloud kernels for NVIDIA GPUs: what _C, which checks and decides, hands to the CUDA
// module.
//
// A GPU reads a kernel map as a table with a column an output. Outputs whose taps are alike stand
// beside each other, so that a thread block, which takes 64 or 128 of them, has few taps to visit:
//
//   position      0  1  2 ..  127 | 128 ..
//   row of y      7  9 31      -1 |  12          -1: nobody, at the end of a group
//   tap 0        -1 -1 -1      -1 |   5 ..       the row of x that this tap meets, or -1
//   tap 1         4  6 -1      -1 |  -1 ..
//
// Python makes it, once for a map (ops/pointcloud_layout.py). Nobody reads it back at a call, which
// would have to wait for the GPU: whatever it says, the kernels stay within their memory.
#include "common/cuda.h"
#include "pointcloud/conv_cuda_config.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

struct OutputTable {
  int64_t taps, n_in, n_out;
  int64_t groups;             // of kGroupRows positions
  int64_t visits;             // length of `visited`
  const int32_t* neighbours;  // [taps][groups * kGroupRows], rows of x
  const int32_t* rows;        // [groups * kGroupRows], rows of y
  // [groups + 1], where each group begins in `visited`: the taps that any of its outputs has,
  // ascending, each with a bit for every 32 positions where one has it: tap << 4 | bits.
  const int32_t *begins, *visited;
};

struct CudaConvArgs {
  DType dtype;  // bfloat16, float16, float32
  OutputTable table;
  int64_t c_in, c_out;
  const void* x;  // [n_in, c_in], its rows x_stride elements apart
  int64_t x_stride;
  const void* weights;  // [taps, c_in, c_out]
  const void* bias;     // [c_out] or null
  Activation activation;
  void* y;  // [n_out, c_out]
  CudaConvConfig config;
};

// The pairs of a map, tap by tap, in segments that end with their tap at the latest.
struct PairSegments {
  int64_t taps, n_in, n_out, pairs, segments;
  const int32_t *in, *out;  // [pairs], rows of x and of dy
  const int64_t* begins;    // [segments + 1], the first pair of each
  const int64_t* of_tap;    // [taps + 1], the first segment of each tap
};

struct CudaWeightGradArgs {
  DType dtype;
  PairSegments map;
  int64_t c_in, c_out;
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  float* partial;  // [segments, c_in, c_out]
  void* dw;        // [taps, c_in, c_out]
};

// All asynchronous on the stream.
struct CudaKernels {
  void (*conv)(const CudaConvArgs& args, CudaStream stream);
  void (*weight_grad)(const CudaWeightGradArgs& args, CudaStream stream);
};

}  // namespace gossamer::pointcloud
