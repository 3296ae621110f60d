#pragma once
// Points to voxels, and coordinates in order, on a GPU. The sorts between the steps are torch's.
#include <cstdint>

#include "pointcloud/keys.h"
#include "pointcloud/voxelize.h"

namespace gossamer::pointcloud {

// Keys that ascend as signed numbers where coordinates do lexicographically.
struct CudaCellKeys {
  int columns;
  int64_t count;
  int64_t low[kMostColumns];
  uint64_t step[kMostColumns];
  const int32_t* coords;  // [count, columns], in the box of the keys
  int64_t* keys;          // [count]
};

// Rows by their keys.
struct CudaOrder {
  int64_t count;
  const int64_t* keys;   // [count], ascending
  const int64_t* order;  // [count], the row of each
  int32_t* rows;         // [count], the same
  // How many keys repeat the one before, count minus the least of their rows, and how many rows
  // are not above the one before.
  int64_t* found;  // [3]
};

// The voxels of points by their cells.
struct CudaVoxels {
  int columns;
  int64_t points, voxels;
  const int32_t* cells;      // [points, columns]
  const int64_t* order;      // [points], the point at each rank
  const int64_t* voxels_to;  // [points], how many voxels begin after rank 0 up to each rank
  int32_t* coords;           // [voxels, columns]
  int64_t* of_point;         // [points]
  int32_t* rows;             // [points], the order
  int64_t* begins;           // [voxels + 1], the rank of each voxel's first point
};

}  // namespace gossamer::pointcloud
