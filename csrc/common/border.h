#pragma once
// The checks of what Python hands over, each with the values in its text. Included by api files
// only; inside, pointers are trusted.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/activation.h"
#include "common/check.h"
#include "common/choice.h"
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

// Rows any distance apart, whose columns lie side by side. The stride of a dimension nobody walks
// along may be anything.
inline void check_adjacent_columns(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.strides[1] == 1 || t.shape[1] <= 1 || t.shape[0] == 0, op, ": ", what,
                 " has strides [", t.strides[0], ", ", t.strides[1],
                 "], its columns must be contiguous");
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

inline void check_on_cpu(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.device == Device::kCPU, op, ": ", what, " is on ", device_text(t),
                 ", the kernel is the CPU's");
}

// Two tensors of one call lie on the same device.
inline void check_device(const char* op, const char* what, const TensorView& t,
                         const char* first_name, const TensorView& first) {
  GOSSAMER_CHECK(t.device == first.device && t.device_index == first.device_index, op, ": ", what,
                 " is on ", device_text(t), ", ", first_name, " on ", device_text(first));
}

inline pybind11::dict report_of(const Choice& choice) {
  pybind11::dict report;
  report["target"] = choice.target;
  report["kernel"] = choice.kernel;
  report["why"] = choice.why;
  return report;
}

// What a weight in floating point may be made of.
inline bool is_weight_dtype(DType t) {
  return t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16 ||
         t == DType::kFloat64;
}

inline void check_weight_dtype(const char* op, const char* what, const TensorView& t) {
  if (!is_weight_dtype(t.dtype)) {
    throw pybind11::type_error(std::string(op) + ": " + what + " is " + name(t.dtype) +
                               ", expected float32, bfloat16, float16 or float64");
  }
}

inline Activation activation_of(const char* op, const std::string& text) {
  if (text == "none") return Activation::kNone;
  if (text == "relu") return Activation::kReLU;
  if (text == "gelu") return Activation::kGELU;
  if (text == "silu") return Activation::kSiLU;
  fail(op, ": activation '", text, "', expected None, 'relu', 'gelu' or 'silu'");
}

// [n] of this dtype on the device of x, or null where there is none.
inline const void* bias_of(const char* op, const std::optional<TensorView>& bias, int64_t n,
                           DType dtype, const TensorView& x) {
  if (!bias) return nullptr;
  check_device(op, "bias", *bias, "x", x);
  check_dtype(op, "bias", *bias, dtype);
  check_vector(op, "bias", *bias, n);
  return bias->data;
}

// What is added to `out` in its layout, in other memory, or null where there is nothing.
inline const void* residual_of(const char* op, const std::optional<TensorView>& residual,
                               const TensorView& out) {
  if (!residual) return nullptr;
  check_device(op, "residual", *residual, "out", out);
  check_dtype(op, "residual", *residual, out.dtype);
  bool same = residual->ndim == out.ndim;
  for (int d = 0; same && d < out.ndim; ++d) same = residual->shape[d] == out.shape[d];
  GOSSAMER_CHECK(same, op, ": residual has shape ", shape_text(*residual), ", out ",
                 shape_text(out));
  check_contiguous(op, "residual", *residual);
  GOSSAMER_CHECK(out.numel() == 0 || residual->data != out.data, op, ": residual is out");
  return residual->data;
}

}  // namespace gossamer
