#pragma once
// What the borders of a CPU's and a GPU's products check alike. Included by api files only.
#include <cmath>

#include "common/border.h"

namespace gossamer::actsparse {

// x [m, k], out [m, n] and weight [rows, columns], all of one dtype on one device.
inline void check_operands(const char* op, const TensorView& out, const TensorView& x,
                           const TensorView& weight) {
  check_matrix(op, "x", x);
  check_matrix(op, "weight", weight);
  check_matrix(op, "out", out);
  check_weight_dtype(op, "x", x);
  check_device(op, "weight", weight, "x", x);
  check_device(op, "out", out, "x", x);
  check_dtype(op, "weight", weight, x.dtype);
  check_dtype(op, "out", out, x.dtype);
  check_adjacent_columns(op, "x", x);
  check_adjacent_columns(op, "weight", weight);
  check_contiguous(op, "out", out);
}

// As torch compares: in the dtype of x.
inline double checked_threshold(const char* op, double threshold, DType dtype) {
  double rounded = threshold;
  if (dtype == DType::kFloat32) rounded = static_cast<float>(threshold);
  if (dtype == DType::kBFloat16) {
    BFloat16 small;
    round_to(static_cast<float>(threshold), small);
    rounded = to_float(small);
  }
  if (dtype == DType::kFloat16) {
    Float16 small;
    round_to(static_cast<float>(threshold), small);
    rounded = to_float(small);
  }
  GOSSAMER_CHECK(threshold >= 0 && std::isfinite(rounded), op, ": threshold is ", threshold,
                 ", expected 0 or more, and finite in ", name(dtype));
  return std::fabs(rounded);  // kernels compare bits, of which -0 has the largest
}

}  // namespace gossamer::actsparse
