#pragma once
// What the border asks of every tensor of a 2:4 operation. Included by api*.cpp files only.
#include <string>

#include "common/check.h"
#include "common/py_tensor.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

inline void check_cpu(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.device == Device::kCPU, op, ": ", what,
                 " is on a CUDA device, the kernels of this build run on the CPU");
}

inline void check_matrix(const char* op, const char* what, const TensorView& t) {
  check_cpu(op, what, t);
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
  check_cpu(op, what, t);
  GOSSAMER_CHECK(t.ndim == 1 && t.shape[0] == length, op, ": ", what, " has shape ", shape_text(t),
                 ", expected [", length, "]");
  check_contiguous(op, what, t);
}

inline void check_size(const char* op, int64_t n, int64_t k) {
  GOSSAMER_CHECK(n >= 1 && k >= 1, op, ": the weight is [", n, ", ", k,
                 "], expected at least [1, 1]");
}

inline Activation activation_of(const char* op, const std::string& text) {
  if (text == "none") return Activation::kNone;
  if (text == "relu") return Activation::kReLU;
  if (text == "gelu") return Activation::kGELU;
  if (text == "silu") return Activation::kSiLU;
  fail(op, ": activation '", text, "' is unknown; none, relu, gelu or silu");
}

}  // namespace gossamer::sparse24
