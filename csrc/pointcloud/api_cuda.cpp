// The border of the convolutions over point clouds on a GPU. What a map's tables hold is not looked
// at here, which would have to wait for the GPU: ops/pointcloud_layout.py makes them of checked
// maps, and the kernels stay within their memory whatever they say.
#include <pybind11/stl.h>

#include "common/cuda_border.h"
#include "common/py_tensor.h"
#include "pointcloud/border_cuda.h"
#include "pointcloud/border_rows.h"
#include "pointcloud/cuda.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

// Channels of a row, the most for which kernels count weights of 32 rows in 32 bits; and taps, or
// channels of one of several groups, the extent of a grid.
constexpr int64_t kMostChannels = 1 << 24, kMostTaps = 65535;

void check_reach(const char* op, int64_t taps, int64_t n_in, int64_t n_out, int64_t c_in,
                 int64_t c_out) {
  GOSSAMER_CHECK(taps <= kMostTaps && c_in <= kMostChannels && c_out <= kMostChannels, op, ": ",
                 taps, " taps of ", c_in, " x ", c_out, " channels, a GPU's kernels have up to ",
                 kMostTaps, " taps and ", kMostChannels, " channels");
  GOSSAMER_CHECK(n_in <= kMostCounted && n_out <= kMostCounted, op, ": ", n_in, " and ", n_out,
                 " voxels, a GPU's kernels count to 2**31 - 1");
}

CudaConvConfig config_of(const char* op, DType dtype, int64_t groups, int64_t c_out,
                         const CudaDevice& device) {
  const CudaConvConfig config = choose_cuda_conv_config(dtype, groups, c_out, device);
  check_grid(op, config.blocks(groups, c_out));
  return config;
}

void bind_forward(const TensorView& y, const TensorView& x, const TensorView& weights,
                  const std::optional<TensorView>& bias, const TensorView& neighbours,
                  const TensorView& rows, const TensorView& begins, const TensorView& visited,
                  int64_t in_groups, const std::string& activation) {
  constexpr const char* op = "pointcloud_conv";
  check_weight_dtype(op, "feats", x);
  check_gpu_dtype(op, "feats", x.dtype);
  check_rows(op, "feats", x, x.dtype);
  check_rows(op, "out", y, x.dtype);
  check_device(op, "out", y, "feats", x);
  check_device(op, "weight", weights, "feats", x);
  const Channels channels = checked_channels(op, weights, x.shape[1], in_groups, x.dtype);
  check_shape(op, "out", y, y.shape[0], channels.out);
  check_contiguous(op, "out", y);
  const void* biases = bias_of(op, bias, channels.out, x.dtype, x);
  const int64_t taps = weights.shape[0];
  check_reach(op, taps, x.shape[0], y.shape[0], channels.in, channels.out);

  GOSSAMER_CHECK(neighbours.ndim == 2, op, ": neighbours have ", neighbours.ndim,
                 " dimensions, expected 2");
  const int64_t positions = neighbours.shape[1], groups = positions / kGroupRows;
  check_dtype(op, "neighbours", neighbours, DType::kInt32);
  check_device(op, "neighbours", neighbours, "feats", x);
  check_shape(op, "neighbours", neighbours, taps, groups * kGroupRows);
  check_contiguous(op, "neighbours", neighbours);
  check_vector_on(op, "rows", rows, DType::kInt32, positions, x);
  check_vector_on(op, "begins", begins, DType::kInt32, groups + 1, x);
  check_vector_on(op, "visited", visited, DType::kInt32, kAnyLength, x);
  GOSSAMER_CHECK(positions >= y.shape[0] && visited.shape[0] <= kMostCounted, op, ": ", positions,
                 " positions and ", visited.shape[0], " visits for ", y.shape[0],
                 " outputs, expected a position for each and fewer than 2**31 visits");

  const CudaModule& module = cuda_module(op, x);
  if (groups == 0) return;
  CudaConvConfig config{CudaConvKernel::kGrouped, 0};
  if (in_groups == 1) {
    config = config_of(op, x.dtype, groups, channels.out, module.device(x.device_index));
  } else {
    check_grid(op, positions);
  }
  const OutputTable table{taps,
                          x.shape[0],
                          y.shape[0],
                          groups,
                          visited.shape[0],
                          neighbours.as<const int32_t>(),
                          rows.as<const int32_t>(),
                          begins.as<const int32_t>(),
                          visited.as<const int32_t>()};
  module.pointcloud->conv(
      {x.dtype, table, channels.in, channels.out, in_groups, x.data, x.strides[0], weights.data,
       biases, activation_of(op, activation), y.data, config},
      stream_of(x));
}

void bind_weight_grad(const TensorView& dw, const TensorView& dy, const TensorView& x,
                      const TensorView& in, const TensorView& out, const TensorView& begins,
                      const TensorView& of_tap, int64_t groups, const TensorView& partial) {
  constexpr const char* op = "pointcloud_conv_weight_grad";
  check_weight_dtype(op, "feats", x);
  check_gpu_dtype(op, "feats", x.dtype);
  check_rows(op, "feats", x, x.dtype);
  check_rows(op, "dy", dy, x.dtype);
  check_device(op, "dy", dy, "feats", x);
  check_device(op, "out", dw, "feats", x);
  const Channels channels = checked_channels(op, dw, x.shape[1], groups, x.dtype);
  check_shape(op, "dy", dy, dy.shape[0], channels.out);
  const int64_t taps = dw.shape[0];
  check_reach(op, taps, x.shape[0], dy.shape[0], channels.in, channels.out);

  check_vector_on(op, "in_rows", in, DType::kInt32, kAnyLength, x);
  check_vector_on(op, "out_rows", out, DType::kInt32, in.shape[0], x);
  check_vector_on(op, "begins", begins, DType::kInt64, kAnyLength, x);
  GOSSAMER_CHECK(begins.shape[0] >= 1, op, ": begins has shape [0], expected at least [1]");
  check_vector_on(op, "of_tap", of_tap, DType::kInt64, taps + 1, x);
  GOSSAMER_CHECK(groups == 1 || dw.shape[1] <= kMostTaps, op, ": ", dw.shape[1],
                 " channels a group, a GPU's kernels have up to ", kMostTaps);
  const int64_t segments = begins.shape[0] - 1;
  check_vector_on(op, "partial", partial, DType::kFloat32, segments * dw.shape[1] * channels.out,
                  x);
  check_grid(op, segments * ceil_div(channels.in, 64) * ceil_div(channels.out, 64));

  const PairSegments map{taps,
                         x.shape[0],
                         dy.shape[0],
                         in.shape[0],
                         segments,
                         in.as<const int32_t>(),
                         out.as<const int32_t>(),
                         begins.as<const int64_t>(),
                         of_tap.as<const int64_t>()};
  cuda_module(op, x).pointcloud->weight_grad(
      {x.dtype, map, channels.in, channels.out, groups, dy.data, x.data, dy.strides[0],
       x.strides[0], partial.as<float>(), dw.data},
      stream_of(x));
}

py::dict choose(const std::string& dtype, int64_t outputs, int64_t c_out,
                const std::variant<int, py::dict>& device) {
  constexpr const char* op = "pointcloud_conv_choose_cuda";
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error(std::string(op) + ": no kernels for " + dtype);
  check_gpu_dtype(op, "dtype", type);
  GOSSAMER_CHECK(outputs >= 0 && c_out >= 1, op, ": ", outputs, " outputs of ", c_out, " channels");
  const int64_t groups = ceil_div(outputs, kGroupRows);
  const CudaConvConfig config = config_of(op, type, groups, c_out, device_of(op, device));
  py::dict report;
  report["target"] = "sm_80";
  report["kernel"] = name(config.kernel);
  report["why"] = config.kernel == CudaConvKernel::kMma
                      ? "tensor cores; outputs with like taps share a thread block"
                      : "exact, which tensor cores are not";
  report["tile_rows"] = config.rows();
  report["tile_outputs"] = config.outputs();
  report["blocks"] = config.blocks(groups, c_out);
  return report;
}

}  // namespace

void bind_conv_cuda(py::module_& m) {
  m.attr("pointcloud_group_rows") = kGroupRows;
  m.attr("pointcloud_quarter_rows") = kQuarterRows;
  m.def("pointcloud_conv_cuda", &bind_forward, py::arg("out"), py::arg("feats"), py::arg("weight"),
        py::arg("bias"), py::arg("neighbours"), py::arg("rows"), py::arg("begins"),
        py::arg("visited"), py::arg("groups"), py::arg("activation"));
  m.def("pointcloud_conv_weight_grad_cuda", &bind_weight_grad, py::arg("out"), py::arg("dy"),
        py::arg("feats"), py::arg("in_rows"), py::arg("out_rows"), py::arg("begins"),
        py::arg("of_tap"), py::arg("groups"), py::arg("partial"));
  m.def("pointcloud_conv_choose_cuda", &choose, py::arg("dtype"), py::arg("outputs"),
        py::arg("c_out"), py::arg("device"));
}

}  // namespace gossamer::pointcloud
