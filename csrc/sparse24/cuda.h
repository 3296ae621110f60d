#pragma once
// The 2:4 kernels for NVIDIA GPUs: what _C, which checks and decides, hands to the CUDA module,
// and the layout of a weight that the tensor-core kernels read.
//
// Fragments, the private layout of a weight with 16-bit and 8-bit values, is cut so that a warp
// loads the operands of mma.sp (and of wgmma.sp with A from registers) by 16 consecutive bytes a
// lane. A record covers 16 rows x 256 columns:
//
//   steps x 32 lanes x 16 bytes   step s: the four A registers of each lane for 32 (16-bit) or 64
//                                 (8-bit) columns from 32 s or 64 s on; 8 or 4 steps
//   32 lanes x 16 bytes           metadata, four words a lane. 16-bit: word j serves the steps 2j
//                                 (selector 0) and 2j + 1 (selector 1); 8-bit: word j serves step j
//
// 4-bit values, which are widened to the 16-bit type of x on their way to mma.sp, take 32 bits a
// lane and step of 32 columns instead, and four steps make 16 bytes:
//
//   2 x 32 lanes x 16 bytes       word j of half h: step 4h + j. Its nibble i holds the first
//                                 element of A register i, nibble 4 + i the second: value + 8
//   32 lanes x 16 bytes           metadata as for 16-bit values
//
// (which element is where in a fragment: common/ptx.cuh). Records of 16 rows follow each other
// along K, tiles of 16 rows along N. Padding has value 0 and the legal indices 0 and 1. That is
// 9/16 (16-bit), 10/16 (8-bit) or 12/16 (4-bit) of the dense bytes. float32 has no tensor-core
// kernel that is exact: its kernel reads the panels of sparse24.h.
#include "common/conv_shape.h"
#include "common/cuda.h"
#include "sparse24/gemm_cuda_config.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

struct CudaGemmArgs {
  DType dtype;  // of x, and of the weight's values unless they are int4
  int64_t m, n, k;
  const uint32_t* panels;  // fragments; float32: panels
  const void* x;           // [m, k], columns contiguous; rows begin at multiples of 16 bytes
  int64_t x_stride;        // between rows, in elements
  const void* bias;        // [n] or null
  Activation activation;
  void* out;        // [m, n] row-major, any alignment of its rows
  DType out_dtype;  // of out and bias
  // The values of the operation are x * x_scales[m] and weight * row_scales[n]; null means 1.
  const float* x_scales;
  const float* row_scales;
  CudaGemmConfig config;
  void* workspace;    // config.workspace_bytes(m, n) bytes of any content
  int32_t* counters;  // kCudaCounters zeros, which the kernel leaves as zeros
  // int4 weights: row_scales is [n, ceil(k / group)], one for each `group` columns of a row. Of
  // other weights 0.
  int64_t group = 0;
};

// A convolution of 16-bit floats with channels side by side: the product of what each pixel of y
// sees of x, tap after tap the channels of a group, which are a multiple of 8.
struct CudaConvArgs {
  CudaGemmArgs gemm;  // m: pixels of y, n: output channels, k: taps * channels of a group
  ConvShape shape;    // a group's outputs, where there are several, a multiple of kFragmentRows
};

struct Misfits {
  int64_t count;
  int64_t first;  // the lowest row * groups + group, if count > 0,
  int byte;       // and validate: its index byte
};

// All asynchronous on the stream, except where a result comes back.
struct CudaKernels {
  void (*gemm)(const CudaGemmArgs& args, CudaStream stream);
  void (*conv)(const CudaConvArgs& args, CudaStream stream);
  // `status`: two int64 in device memory. Groups with more than two non-zeros are cut down to the
  // first two and counted.
  Misfits (*from_dense)(const void* dense, const Weight& shape, void* values, uint8_t* indices,
                        int64_t* status, CudaStream stream);
  void (*gather)(const void* dense, const Weight& pattern, void* values, CudaStream stream);
  void (*to_dense)(const Weight& weight, void* dense, CudaStream stream);
  Misfits (*validate)(const Weight& weight, int64_t* status, CudaStream stream);
  void (*to_panels)(const Weight& weight, uint32_t* panels, CudaStream stream);
  void (*from_panels)(const Weight& panels, void* values, uint8_t* indices, CudaStream stream);
};

}  // namespace gossamer::sparse24
