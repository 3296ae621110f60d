#pragma once
// What a GPU's kernels read of a kernel map, and how it is made of the map's own tensors
// (ops/pointcloud_layout.py has the sorts between the steps). Nothing here waits for the GPU.
#include <cstdint>

namespace gossamer::pointcloud {

// A kernel map as its tensors have it: ranks in ascending coordinates, tap by tap.
struct CudaPairs {
  int64_t taps, n_in, n_out, pairs;
  int64_t most;                         // pairs of the fullest tap
  const int32_t *in, *out;              // [pairs], ranks
  const int32_t *in_order, *out_order;  // [n_in], [n_out], the rows of ranks, or null
  const int64_t* tap_offsets;           // [taps + 1], on the GPU
};

// Outputs in the order of their masks, in groups of kGroupRows positions, before these are sorted.
struct CudaGroups {
  const int64_t* order;  // [n_out], the rank at each position
  int64_t groups;
  int32_t* places;  // [n_out], the position of each rank
  // [groups][taps], a bit for every quarter with the tap; then [groups], how many are not 0.
  int32_t* bits;
};

// The table that CudaConvArgs reads (cuda.h), of the groups in their last order.
struct CudaTable {
  const int64_t* heavy;  // [groups], the group at each place
  int64_t visits;        // length of `visited`
  const int32_t* begins;
  int32_t *neighbours, *rows, *visited;  // neighbours: all -1
};

}  // namespace gossamer::pointcloud
