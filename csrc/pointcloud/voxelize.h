#pragma once
// Points in space to voxels: the cell of each point, the cells that hold one in ascending order,
// and one row of features a voxel. A voxel sums its points in the order of their rows, whatever the
// number of threads.
#include <cstdint>

#include "common/dtype.h"

namespace gossamer::pointcloud {

// coords [count, 1 + axes] = (batch, floor(point / size)), in float64. batch [count] or null is all
// zero. The first point that is not finite or whose cell int32 does not hold is an error.
template <class Real, class Index>
void quantize(const Real* points, const Index* batch, int64_t count, int axes, const double* size,
              int32_t* coords, int threads);

// Counts the voxels of sorted rows; order as of sort(), null for the rows' own.
int64_t count_voxels(const int32_t* coords, const int32_t* order, int64_t count, int columns,
                     int threads);
// voxel_of [count]: the voxel of each row; begins [voxels + 1]: the rank of its first row;
// voxel_coords [voxels, columns].
void write_voxels(const int32_t* coords, const int32_t* order, int64_t count, int columns,
                  int64_t* voxel_of, int64_t* begins, int32_t* voxel_coords, int threads);

enum class Reduce : uint8_t { kMean, kFirst, kMax };

struct ReduceArgs {
  DType dtype;
  const void* feats;     // [points, channels]
  const int32_t* order;  // or null
  const int64_t* begins;
  int64_t voxels, channels;
  Reduce reduce;
  void* out;  // [voxels, channels]
  int threads;
};
void reduce(const ReduceArgs& args);

}  // namespace gossamer::pointcloud
