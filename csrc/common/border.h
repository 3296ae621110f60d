#pragma once
// The checks of what Python hands over, each with the values in its text. Included by api files
// only; inside, pointers are trusted.
#include <pybind11/pybind11.h>

#include <string>

#include "common/check.h"
#include "common/tensor_view.h"

namespace gossamer {

inline std::string device_text(const TensorView& t) {
  return t.device == Device::kCPU ? "cpu" : "cuda:" + std::to_string(t.device_index);
}

inline void check_matrix(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.ndim == 2, op, ": ", what, " has ", t.ndim, " dimensions, expected 2");
}

inline void check_contiguous(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.is_contiguous(), op, ": ", what, " of shape ", shape_text(t),
                 " must be contiguous");
}

inline void check_dtype(const char* op, const char* what, const TensorView& t, DType expected) {
  if (t.dtype != expected) {
    throw pybind11::type_error(std::string(op) + ": " + what + " is " + name(t.dtype) +
                               ", expected " + name(expected));
  }
}

inline void check_shape(const char* op, const char* what, const TensorView& t, int64_t rows,
                        int64_t columns) {
  GOSSAMER_CHECK(t.shape[0] == rows && t.shape[1] == columns, op, ": ", what, " has shape ",
                 shape_text(t), ", expected [", rows, ", ", columns, "]");
}

inline void check_vector(const char* op, const char* what, const TensorView& t, int64_t length) {
  GOSSAMER_CHECK(t.ndim == 1 && t.shape[0] == length, op, ": ", what, " has shape ", shape_text(t),
                 ", expected [", length, "]");
  check_contiguous(op, what, t);
}

// Two tensors of one call lie on the same device.
inline void check_device(const char* op, const char* what, const TensorView& t,
                         const char* first_name, const TensorView& first) {
  GOSSAMER_CHECK(t.device == first.device && t.device_index == first.device_index, op, ": ", what,
                 " is on ", device_text(t), ", ", first_name, " on ", device_text(first));
}

}  // namespace gossamer
