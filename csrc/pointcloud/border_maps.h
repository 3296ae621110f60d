#pragma once
// The checks of coordinates that Python hands over. Included by api files only.
#include <optional>

#include "common/border.h"
#include "common/py_tensor.h"
#include "pointcloud/maps.h"

namespace gossamer::pointcloud {

inline void check_ints(const char* op, const char* what, const TensorView& t, DType dtype) {
  GOSSAMER_CHECK(t.device == Device::kCPU, op, ": ", what, " on ", device_text(t),
                 ", this is the CPU's");
  check_dtype(op, what, t, dtype);
  check_contiguous(op, what, t);
}

inline void check_coords(const char* op, const char* what, const TensorView& coords) {
  check_matrix(op, what, coords);
  check_ints(op, what, coords, DType::kInt32);
  GOSSAMER_CHECK(coords.shape[1] >= 2 && coords.shape[1] <= kMostColumns, op, ": ", what,
                 " have shape ", shape_text(coords), ", expected 2 to 5 columns");
  GOSSAMER_CHECK(coords.shape[0] <= INT32_MAX, op, ": ", coords.shape[0], " voxels, at most ",
                 INT32_MAX);
}

inline Rows rows_of(const char* op, const char* what, const TensorView& coords,
                    const std::optional<TensorView>& order) {
  check_coords(op, what, coords);
  if (order) {
    check_vector(op, "order", *order, coords.shape[0]);
    check_ints(op, "order", *order, DType::kInt32);
  }
  return {coords.as<int32_t>(), order ? order->as<int32_t>() : nullptr, coords.shape[0],
          static_cast<int>(coords.shape[1])};
}

}  // namespace gossamer::pointcloud
