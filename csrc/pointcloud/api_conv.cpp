// The border of the convolutions over point clouds: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include "common/py_tensor.h"
#include "pointcloud/border_kernel_map.h"
#include "pointcloud/border_rows.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

void check_cpu_rows(const char* op, const char* what, const TensorView& t, DType dtype) {
  check_rows(op, what, t, dtype);
  check_on_cpu(op, what, t);
}

void bind_forward(const TensorView& y, const TensorView& x, const TensorView& weights,
                  const std::optional<TensorView>& bias, const TensorView& in,
                  const TensorView& out, const TensorView& tap_offsets,
                  const std::optional<TensorView>& in_order,
                  const std::optional<TensorView>& out_order, int64_t groups,
                  const std::string& activation, int threads) {
  constexpr const char* op = "pointcloud_conv";
  check_weight_dtype(op, "feats", x);
  check_cpu_rows(op, "feats", x, x.dtype);
  check_cpu_rows(op, "out", y, x.dtype);
  const Channels channels = checked_channels(op, weights, x.shape[1], groups, x.dtype);
  check_shape(op, "out", y, y.shape[0], channels.out);
  check_contiguous(op, "out", y);
  const void* biases = bias_of(op, bias, channels.out, x.dtype, x);
  const KernelMap map =
      checked_map(op, {in, out, tap_offsets, in_order, out_order}, weights.shape[0], x.shape[0],
                  y.shape[0], Ascent::kStrict, threads);
  conv({x.dtype, map, channels, x.data, x.strides[0], weights.data, biases,
        activation_of(op, activation), y.data, threads});
}

void bind_weight_grad(const TensorView& dw, const TensorView& dy, const TensorView& x,
                      const TensorView& in, const TensorView& out, const TensorView& tap_offsets,
                      const std::optional<TensorView>& in_order,
                      const std::optional<TensorView>& out_order, int64_t groups, int threads) {
  constexpr const char* op = "pointcloud_conv_weight_grad";
  check_weight_dtype(op, "feats", x);
  check_cpu_rows(op, "feats", x, x.dtype);
  check_cpu_rows(op, "dy", dy, x.dtype);
  const Channels channels = checked_channels(op, dw, x.shape[1], groups, x.dtype);
  check_shape(op, "dy", dy, dy.shape[0], channels.out);
  const KernelMap map = checked_map(op, {in, out, tap_offsets, in_order, out_order}, dw.shape[0],
                                    x.shape[0], dy.shape[0], Ascent::kStrict, threads);
  weight_grad(
      {x.dtype, map, channels, dy.data, x.data, dy.strides[0], x.strides[0], dw.data, threads});
}

}  // namespace

void bind_conv(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pointcloud_conv", &bind_forward, py::arg("out"), py::arg("feats"), py::arg("weight"),
        py::arg("bias"), py::arg("in_index"), py::arg("out_index"), py::arg("tap_offsets"),
        py::arg("in_order"), py::arg("out_order"), py::arg("groups"), py::arg("activation"),
        py::arg("threads"), release());
  m.def("pointcloud_conv_weight_grad", &bind_weight_grad, py::arg("out"), py::arg("dy"),
        py::arg("feats"), py::arg("in_index"), py::arg("out_index"), py::arg("tap_offsets"),
        py::arg("in_order"), py::arg("out_order"), py::arg("groups"), py::arg("threads"),
        release());
  m.def(
      "pointcloud_conv_choose",
      [](const std::string& dtype, int64_t c_in, int64_t c_out, int64_t groups) {
        const DType type = dlpack::dtype_from_name(dtype);
        if (!is_weight_dtype(type)) {
          throw py::type_error("pointcloud_conv_choose: no kernels for " + dtype);
        }
        return report_of(choose_conv(type, {groups, c_in, c_out}));
      },
      py::arg("dtype"), py::arg("c_in"), py::arg("c_out"), py::arg("groups") = 1);
}

}  // namespace gossamer::pointcloud
