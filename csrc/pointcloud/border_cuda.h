#pragma once
// A check that the borders of a GPU's kernels share. Included by api files only.
#include "common/border.h"

namespace gossamer::pointcloud {

constexpr int64_t kAnyLength = -1;

// A vector on the device of the first operand.
inline const TensorView& check_vector_on(const char* op, const char* what, const TensorView& t,
                                         DType dtype, int64_t length, const TensorView& first,
                                         const char* first_name = "feats") {
  check_device(op, what, t, first_name, first);
  check_dtype(op, what, t, dtype);
  GOSSAMER_CHECK(t.ndim == 1, op, ": ", what, " has ", t.ndim, " dimensions, expected 1");
  check_vector(op, what, t, length == kAnyLength ? t.shape[0] : length);
  return t;
}

}  // namespace gossamer::pointcloud
