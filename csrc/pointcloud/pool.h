#pragma once
// Pooling over the pairs of a kernel map, the voxels being rows of features:
//
//   out[j] = sum, mean or maximum of in[i] over the pairs (i, j)
//
// Only voxels that exist take part. One that is paired with none becomes 0. The pairs of a tap
// ascend in j, so a tile of outputs owns one run of them in every tap:
//
//   tap 0  |..j < tile..|#########|.....|
//   tap 1  |...|######|.................|       # the pairs of one tile
//   tap 2  |........|###########|.......|
//
// Each output takes its pairs by tap, in the order of the map, whoever computes the tile: the same
// bits for any number of threads.
#include <cstdint>

#include "common/dtype.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

struct PoolArgs {
  DType dtype;    // float32, bfloat16, float16, float64
  KernelMap map;  // within a tap out ascends, weakly
  int64_t channels;
  const void* feats;  // [n_in, channels], its rows feats_stride elements apart
  int64_t feats_stride;
  void* out;  // [n_out, channels]
  int threads;
};

void sum_pool(const PoolArgs& args, bool mean);  // summed in double
// winner [n_out, channels]: the row of the feature that was taken, -1 where there was none. Of
// equal features the first pair's is taken; a NaN beats all.
void max_pool(const PoolArgs& args, int32_t* winner);
// The gradient: out[j] = sum of in[i, c] over the pairs (i, j) with winner[i, c] == j, the pairs
// being those of the pooling the other way round.
void max_pool_grad(const PoolArgs& args, const int32_t* winner);

void bind_pool(pybind11::module_& m);
void bind_pool_cuda(pybind11::module_& m);

}  // namespace gossamer::pointcloud
