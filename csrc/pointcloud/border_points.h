#pragma once
// The checks of points, for the CPU's kernels and a GPU's. Included by api files only.
#include <string>
#include <utility>
#include <vector>

#include "common/border.h"
#include "pointcloud/voxelize.h"

namespace gossamer::pointcloud {

// Without their samples. cells: [count, 1 + axes], checked by itself.
inline Points points_of(const char* op, const TensorView& points, const std::vector<double>& size,
                        const TensorView& cells) {
  check_matrix(op, "points", points);
  check_contiguous(op, "points", points);
  if (points.dtype != DType::kFloat32 && points.dtype != DType::kFloat64) {
    throw pybind11::type_error(std::string(op) + ": points are " + name(points.dtype) +
                               ", expected float32 or float64");
  }
  check_device(op, "points", points, "coords", cells);
  check_shape(op, "coords", cells, points.shape[0], points.shape[1] + 1);
  GOSSAMER_CHECK(std::cmp_equal(size.size(), points.shape[1]), op, ": ", size.size(),
                 " sizes for points of ", points.shape[1], " axes");
  Points of{points.dtype, points.data, nullptr, points.shape[0], static_cast<int>(size.size()), {}};
  for (size_t a = 0; a < size.size(); ++a) {
    GOSSAMER_CHECK(size[a] > 0, op, ": voxel_size is ", size[a], " along axis ", a);
    of.size[a] = size[a];
  }
  return of;
}

}  // namespace gossamer::pointcloud
