// The border of the quantised GEMM: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include "common/py_tensor.h"
#include "sparse24/api.h"
#include "sparse24/quantized.h"

namespace py = pybind11;

namespace gossamer::sparse24 {
namespace {

constexpr const char* kOp = "sparse24_linear_quantized";

bool is_floating(DType t) {
  return t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16;
}

QuantizedWeight quantized(const TensorView& values, const TensorView& indices,
                          const TensorView& scales, int64_t n, int64_t k, int64_t group) {
  check_matrix(kOp, "values", values);
  check_matrix(kOp, "indices", indices);
  check_matrix(kOp, "scales", scales);
  if (values.dtype != DType::kInt8 && values.dtype != DType::kE4M3 &&
      values.dtype != DType::kUInt8) {
    throw py::type_error(std::string(kOp) + ": values are " + name(values.dtype) +
                         ", expected int8, float8_e4m3fn or uint8 (int4)");
  }
  check_dtype(kOp, "indices", indices, DType::kUInt8);
  check_dtype(kOp, "scales", scales, DType::kFloat32);
  check_device(kOp, "indices", indices, "values", values);
  check_device(kOp, "scales", scales, "values", values);
  check_size(kOp, n, k);
  const bool grouped = values.dtype == DType::kUInt8 && group >= 4 && group % 4 == 0 && group < k;
  GOSSAMER_CHECK(group == k || grouped, kOp, ": group is ", group, " of ", k, " columns of ",
                 name(values.dtype), ", expected ", k, " or, of int4 weights, a multiple of 4");
  const QuantizedWeight w{values.dtype,
                          n,
                          k,
                          group,
                          values.data,
                          indices.as<const uint8_t>(),
                          scales.as<const float>()};
  check_shape(kOp, "values", values, n, w.value_columns());
  check_shape(kOp, "indices", indices, n, w.index_bytes());
  check_shape(kOp, "scales", scales, n, w.scale_columns());
  check_contiguous(kOp, "values", values);
  check_contiguous(kOp, "indices", indices);
  check_contiguous(kOp, "scales", scales);
  return w;
}

void bind_linear_quantized(const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& x_scale, const TensorView& values,
                           const TensorView& indices, const TensorView& scales,
                           const std::optional<TensorView>& bias, int64_t group,
                           const std::string& activation, int threads) {
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "out", out);
  GOSSAMER_CHECK(x.device == Device::kCPU, kOp, ": x is on ", device_text(x),
                 ", this is the CPU's product");
  check_device(kOp, "out", out, "x", x);
  check_device(kOp, "values", values, "x", x);
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  const QuantizedWeight w = quantized(values, indices, scales, n, k, group);
  if (w.four_bit() ? !is_floating(x.dtype) : x.dtype != w.dtype) {
    throw py::type_error(std::string(kOp) + ": x is " + name(x.dtype) + ", expected " +
                         (w.four_bit() ? "float32, bfloat16 or float16" : name(w.dtype)));
  }
  GOSSAMER_CHECK(k == 1 || x.strides[1] == 1, kOp, ": the columns of x lie ", x.strides[1],
                 " apart, expected 1");
  GOSSAMER_CHECK(x_scale.has_value() != w.four_bit(), kOp,
                 ": 8-bit weights need x_scale, int4 weights take none");
  if (x_scale) {
    check_device(kOp, "x_scale", *x_scale, "x", x);
    check_dtype(kOp, "x_scale", *x_scale, DType::kFloat32);
    check_vector(kOp, "x_scale", *x_scale, m);
  }
  if (!is_floating(out.dtype)) {
    throw py::type_error(std::string(kOp) + ": out is " + name(out.dtype) +
                         ", expected float32, bfloat16 or float16");
  }
  check_shape(kOp, "out", out, m, n);
  check_contiguous(kOp, "out", out);
  gemm_quantized_serial({w, m, x.dtype, x.data, x.strides[0],
                         x_scale ? x_scale->as<const float>() : nullptr, out.dtype,
                         bias_of(kOp, bias, n, out.dtype, x), activation_of(kOp, activation),
                         out.data, threads});
}

}  // namespace

void bind_quantized(py::module_& m) {
  m.def("sparse24_linear_quantized", &bind_linear_quantized, py::arg("out"), py::arg("x"),
        py::arg("x_scale"), py::arg("values"), py::arg("indices"), py::arg("scales"),
        py::arg("bias"), py::arg("group"), py::arg("activation"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace gossamer::sparse24
