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
#include "pointcloud/cuda_layout.h"
#include "pointcloud/cuda_pool.h"
#include "pointcloud/cuda_voxelize.h"
#include "pointcloud/divisor.h"
#include "pointcloud/keys.h"
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
  int64_t c_in, c_out, groups;
  const void* x;  // [n_in, c_in], its rows x_stride elements apart
  int64_t x_stride;
  const void* weights;  // [taps, c_in / groups, c_out]
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
  int64_t c_in, c_out, groups;
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  float* partial;  // [segments, c_in / groups, c_out]
  void* dw;        // [taps, c_in / groups, c_out]
};

// Where the windows of a map's walkers begin and what they reach, in numbers of cells (keys.h):
// target = walker * stride - padding + tap * dilation.
struct WindowKeys {
  int columns;
  uint64_t step[kMostColumns];
  int64_t low[kMostColumns];                        // of the cell 0
  int64_t least[kMostColumns], most[kMostColumns];  // of the beginnings that can meet a target
  int64_t stride[kMostColumns], padding[kMostColumns];
  int64_t lines, line_taps;             // taps that differ along the last axis alone are a line
  int64_t kernel[kMostColumns - 1];     // of each axis
  uint64_t tap_step[kMostColumns - 1];  // between the keys of neighbouring taps
  int64_t dilation;                     // along the last axis
};

// A set of coordinates in ascending order, and the keys that its ranks get.
struct NumberedRows {
  const int32_t* coords;  // [count, columns]
  const int32_t* order;   // [count], or null where the rows ascend
  int64_t count;
  uint64_t* keys;  // [count]
};

// 32 walkers at a time are looked at under a line of taps, first to count their pairs.
constexpr int64_t kSearchWalkers = 32;

struct CudaSearchArgs {
  WindowKeys window;
  int64_t walkers, targets;
  const uint64_t *walker_keys, *target_keys;  // kNoKey: a walker that meets nobody
  int32_t* counts;                            // [taps, chunks of walkers], while counting
  const int64_t* ends;                        // the sums of these, up to and with each
  int32_t *walker_ranks, *target_ranks;       // [pairs], or null while counting
  int64_t pairs;
};

// The outputs that a strided or transposed layer makes, by their keys in the box of all outputs.
struct CudaOutputsArgs {
  int columns;
  int64_t inputs, taps;
  const int32_t* coords;                          // [inputs, columns]
  int64_t low[kMostColumns], high[kMostColumns];  // of the outputs
  uint64_t step[kMostColumns];
  int64_t kernel[kMostColumns - 1], stride[kMostColumns - 1], padding[kMostColumns - 1],
      dilation[kMostColumns - 1];
  Divisor by_kernel[kMostColumns - 1], by_stride[kMostColumns - 1];
  // (input + padding - tap * dilation) / stride, where there is no remainder if it has to be exact;
  // or input * stride - padding + tap * dilation.
  bool divides, exact;
  uint8_t* marks;  // [cells], 1 at each output's key, or null
  uint64_t* keys;  // else [taps, inputs], or kNoKey
};

// Coordinates of keys.
struct CudaCells {
  int columns;
  int64_t low[kMostColumns];
  uint64_t step[kMostColumns];
  Divisor by_step[kMostColumns];
  int64_t count;
  const uint64_t* keys;  // [count], below 2**63
  int32_t* coords;       // [count, columns]
};

// All asynchronous on the stream.
struct CudaKernels {
  void (*conv)(const CudaConvArgs& args, CudaStream stream);
  void (*weight_grad)(const CudaWeightGradArgs& args, CudaStream stream);
  // The key of each target, and of each walker's window.
  void (*number)(const WindowKeys& window, const NumberedRows& rows, bool walkers,
                 CudaStream stream);
  void (*search)(const CudaSearchArgs& args, CudaStream stream);
  void (*outputs)(const CudaOutputsArgs& args, CudaStream stream);
  void (*cells)(const CudaCells& args, CudaStream stream);
  // masks [n_out], in 64 bits where `wide`, else 32: the taps of each rank.
  void (*mask_taps)(const CudaPairs& pairs, void* masks, bool wide, CudaStream stream);
  void (*group_outputs)(const CudaPairs& pairs, const CudaGroups& groups, CudaStream stream);
  void (*fill_table)(const CudaPairs& pairs, const CudaGroups& groups, const CudaTable& table,
                     CudaStream stream);
  void (*rows_of_pairs)(const CudaPairs& pairs, int32_t* in_rows, int32_t* out_rows,
                        CudaStream stream);
  void (*list_pairs)(const CudaListing& listing, CudaStream stream);
  void (*pool)(const CudaPoolArgs& args, CudaStream stream);
  // refused [1]: how many points there are from the first that lies in no cell on; 0 of none.
  void (*quantize)(const Points& points, int32_t* cells, int64_t* refused, CudaStream stream);
  void (*cell_keys)(const CudaCellKeys& args, CudaStream stream);
  void (*inspect)(const CudaOrder& args, CudaStream stream);
  void (*voxels)(const CudaVoxels& args, CudaStream stream);
};

}  // namespace gossamer::pointcloud
