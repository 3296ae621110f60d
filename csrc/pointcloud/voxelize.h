#pragma once
// Points in space to voxels: the cell of each point, the cells that hold one in ascending order,
// and one row of features a voxel, reduced over its points in the order of their rows.
#include <cstdint>

#include "common/dtype.h"
#include "pointcloud/maps.h"

namespace gossamer::pointcloud {

struct Points {
  DType dtype;            // float32 or float64
  const void* positions;  // [count, axes]
  const int32_t* batch;   // [count], or null where all are of sample 0
  int64_t count;
  int axes;
  double size[kMostColumns - 1];  // of a voxel
};

// coords [count, 1 + axes] = (batch, floor(position / size)), divided in float64. The first point
// that is not finite, or lies in a cell beyond int32, is an error.
void quantize(const Points& points, int32_t* coords, int threads);

// The groups of equal rows, in ascending order.
class Voxels {
 public:
  Voxels(const Rows& rows, int threads);

  int64_t count() const { return first_[parts_]; }
  const Rows& rows() const { return rows_; }
  // coords [count, columns]; voxel_of [rows]; begins [count + 1], the rank of each voxel's first
  // row.
  void write(int32_t* coords, int64_t* voxel_of, int64_t* begins) const;

 private:
  bool begins_at(int64_t rank) const;

  Rows rows_;  // which outlive this
  int parts_;
  std::vector<int64_t> first_;  // [parts + 1], the voxels before each part of the rows
};

enum class Reduce : uint8_t { kMean, kFirst, kMax };

struct ReduceArgs {
  DType dtype;           // float32, bfloat16, float16, float64
  const void* feats;     // [points, channels]
  const int32_t* order;  // [points], or null
  const int64_t* begins;
  int64_t points, voxels, channels;
  Reduce reduce;  // sums in float64; a NaN reaches the mean and the maximum
  void* out;      // [voxels, channels]
  int threads;
};
void reduce(const ReduceArgs& args);

}  // namespace gossamer::pointcloud
