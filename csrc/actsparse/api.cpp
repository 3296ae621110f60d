// The border of the products that skip zero activations: what Python hands over is checked here,
// once.
#include <pybind11/stl.h>

#include "actsparse/actsparse.h"
#include "actsparse/border_rows.h"
#include "common/py_tensor.h"

namespace py = pybind11;

namespace gossamer::actsparse {
namespace {

bool bind_linear(const TensorView& out, const TensorView& x, const TensorView& weight,
                 const std::optional<TensorView>& bias, double threshold,
                 const std::string& activation, int threads) {
  constexpr const char* op = "actsparse_linear";
  check_operands(op, out, x, weight);
  check_on_cpu(op, "x", x);
  const int64_t m = x.shape[0], k = weight.shape[0], n = weight.shape[1];
  check_shape(op, "x", x, m, k);
  check_shape(op, "out", out, m, n);
  const void* bias_data = bias_of(op, bias, n, x.dtype, x);
  return linear({x.dtype, m, n, k, x.data, x.strides[0], weight.data, weight.strides[0], bias_data,
                 checked_threshold(op, threshold, x.dtype), activation_of(op, activation), out.data,
                 threads});
}

bool bind_outputs(const TensorView& out, const TensorView& x, const TensorView& weight,
                  const TensorView& wanted, const std::optional<TensorView>& bias,
                  const std::string& activation, int threads) {
  constexpr const char* op = "actsparse_outputs";
  check_operands(op, out, x, weight);
  check_on_cpu(op, "x", x);
  const int64_t m = x.shape[0], n = weight.shape[0], k = weight.shape[1];
  check_shape(op, "x", x, m, k);
  check_shape(op, "out", out, m, n);
  check_matrix(op, "wanted", wanted);
  check_device(op, "wanted", wanted, "x", x);
  check_dtype(op, "wanted", wanted, DType::kUInt8);
  check_shape(op, "wanted", wanted, m, n);
  check_contiguous(op, "wanted", wanted);
  const void* bias_data = bias_of(op, bias, n, x.dtype, x);
  return outputs({x.dtype, m, n, k, x.data, x.strides[0], weight.data, weight.strides[0], bias_data,
                  wanted.as<const uint8_t>(), activation_of(op, activation), out.data, threads});
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("actsparse_linear", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("threshold"), py::arg("activation"), py::arg("threads"),
        release());
  m.def("actsparse_outputs", &bind_outputs, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("wanted"), py::arg("bias"), py::arg("activation"), py::arg("threads"), release());
  m.def(
      "actsparse_target",
      [](const std::string& dtype) {
        const DType type = dlpack::dtype_from_name(dtype);
        if (!is_weight_dtype(type)) {
          throw py::type_error("actsparse_target: no kernels for " + dtype);
        }
        return std::string(kernel_target(type));
      },
      py::arg("dtype"));
}

}  // namespace gossamer::actsparse
