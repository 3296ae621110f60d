#pragma once
// The checks of features and weights, for the CPU's kernels and a GPU's. Included by api files
// only.
#include "common/border.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

// A matrix with a row a voxel, of any distance between rows.
inline void check_rows(const char* op, const char* what, const TensorView& t, DType dtype) {
  check_matrix(op, what, t);
  check_dtype(op, what, t, dtype);
  check_adjacent_columns(op, what, t);
}

inline Channels checked_channels(const char* op, const TensorView& weights, int64_t c_in,
                                 int64_t groups, DType dtype) {
  GOSSAMER_CHECK(weights.ndim == 3, op, ": weight has ", weights.ndim,
                 " dimensions, expected 3: [taps, C_in / groups, C_out]");
  check_dtype(op, "weight", weights, dtype);
  check_contiguous(op, "weight", weights);
  const int64_t c_out = weights.shape[2];
  GOSSAMER_CHECK(weights.shape[0] >= 1 && weights.shape[1] >= 1 && c_out >= 1, op,
                 ": weight has shape ", shape_text(weights), ", expected at least [1, 1, 1]");
  GOSSAMER_CHECK(groups >= 1 && c_in == groups * weights.shape[1] && c_out % groups == 0, op,
                 ": weight of shape ", shape_text(weights), " and ", groups,
                 " groups do not fit features of ", c_in, " channels");
  return {groups, c_in, c_out};
}

}  // namespace gossamer::pointcloud
