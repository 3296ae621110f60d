// The border of 2:4 convolutions on a GPU.
#include <pybind11/stl.h>

#include <variant>

#include "common/conv_border.h"
#include "common/py_tensor.h"
#include "sparse24/api.h"
#include "sparse24/choose_conv_cuda.h"
#include "sparse24/conv.h"

namespace py = pybind11;

namespace gossamer::sparse24 {
namespace {

constexpr const char* kOp = "sparse24_conv";

NamedConfig name_of(const CudaGemmConfig& c) {
  return {name(c.kernel), c.tile_n, c.tile_m, c.warps_k, c.split_k, c.blocks};
}

CudaConvChoice named(const ConvShape& s, DType dtype, const CudaDevice& device,
                     const NamedConfig& given) {
  std::optional<CudaGemmConfig> found;
  for_each_pixel_way(s, dtype, device, [&](const CudaGemmConfig& config) {
    if (name_of(config) == given) found = config;
  });
  const auto& [kernel, tile_n, tile_m, warps_k, split_k, blocks] = given;
  GOSSAMER_CHECK(found, kOp, ": no kernel computes this convolution as ", kernel, " ", tile_n,
                 " x ", tile_m, ", warps_k ", warps_k, ", split_k ", split_k, ", blocks ", blocks);
  return {ConvWay::kPixels, *found, "given"};
}

int64_t bytes_of(const CudaConvChoice& choice, const ConvShape& s) {
  const ConvProduct of(s);
  return choice.way == ConvWay::kMatrix ? workspace_bytes(choice.config, of.m, of.n)
                                        : conv_workspace_bytes(choice.config, s);
}

// Whether there is nothing to compute.
bool is_empty(const ConvShape& s) { return s.batch * s.out_pixels() == 0; }

void bind_product(const TensorView& out, const TensorView& x, const TensorView& weight,
                  const std::optional<TensorView>& bias, int64_t groups, const Axes& kernel,
                  const Axes& stride, const Axes& padding, const Axes& dilation,
                  const std::string& activation, const std::optional<TensorView>& workspace,
                  const std::optional<TensorView>& counters,
                  const std::optional<NamedConfig>& config) {
  const CudaModule& module = cuda_module(kOp, x);
  check_dims(kOp, "x", x, 5);
  check_dims(kOp, "out", out, 5);
  check_dtype(kOp, "out", out, x.dtype);
  check_device(kOp, "out", out, "x", x);
  check_device(kOp, "the weight", weight, "x", x);
  const ConvShape s =
      conv_shape(kOp, x.shape, out.shape, groups, kernel, stride, padding, dilation, true);
  const Weight w =
      panels(kOp, weight, panel_dtype(name(x.dtype)), s.out_channels, conv_columns(kOp, s));
  CudaConvArgs args{};
  args.shape = s;
  const ConvProduct of(s);
  CudaGemmArgs& gemm = args.gemm;
  gemm.dtype = gemm.out_dtype = x.dtype;
  gemm.m = of.m, gemm.n = of.n, gemm.k = of.k;
  gemm.panels = w.panels;
  gemm.x = x.data;
  gemm.x_stride = s.in_channels;
  gemm.bias = bias_of(kOp, bias, s.out_channels, x.dtype, x);
  gemm.activation = activation_of(kOp, activation);
  gemm.out = out.data;
  if (is_empty(s)) return;
  GOSSAMER_CHECK(reinterpret_cast<uintptr_t>(x.data) % 16 == 0, kOp, ": x begins at ", x.data,
                 ", which is no multiple of 16 bytes");
  const CudaDevice device = module.device(x.device_index);
  const CudaConvChoice choice =
      config ? named(s, x.dtype, device, *config) : choose_cuda_conv(s, x.dtype, device);
  GOSSAMER_CHECK(choice.way != ConvWay::kDense, kOp, ": no kernel here: ", choice.why);
  gemm.config = choice.config;
  const CudaWorkspace meeting =
      workspace_of(kOp, bytes_of(choice, s), kCudaCounters, workspace, counters, x);
  gemm.workspace = meeting.sums, gemm.counters = meeting.counters;
  if (choice.way == ConvWay::kMatrix) {
    module.sparse24->gemm(gemm, stream_of(x));
  } else {
    module.sparse24->conv(args, stream_of(x));
  }
}

using Sizes = std::array<int64_t, 5>;  // batch, d, h, w, channels

ConvShape shape_of(const Sizes& x, const Sizes& out, int64_t groups, const Axes& kernel,
                   const Axes& stride, const Axes& padding, const Axes& dilation) {
  gossamer::check_size(kOp, "the batch", x[0], 0);
  const ConvShape s =
      conv_shape(kOp, x.data(), out.data(), groups, kernel, stride, padding, dilation, true);
  conv_columns(kOp, s);
  return s;
}

DType weight_dtype(const std::string& dtype) {
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error(std::string(kOp) + ": no kernels for " + dtype);
  return type;
}

py::dict choose(const Sizes& x, const Sizes& out, const std::string& dtype, int64_t groups,
                const Axes& kernel, const Axes& stride, const Axes& padding, const Axes& dilation,
                const std::variant<int, py::dict>& device) {
  const DType type = weight_dtype(dtype);
  const ConvShape s = shape_of(x, out, groups, kernel, stride, padding, dilation);
  const CudaDevice traits = device_of(kOp, device);
  const CudaConvChoice choice = is_empty(s)
                                    ? CudaConvChoice{ConvWay::kDense, {}, "nothing to compute"}
                                    : choose_cuda_conv(s, type, traits);
  py::dict report;
  if (choice.way == ConvWay::kDense) {
    report["kernel"] = "dense";
    report["target"] = "torch";
    report["workspace_bytes"] = 0;
  } else {
    report = report_of(choice.config, bytes_of(choice, s));
    report["rows"] = choice.way == ConvWay::kMatrix ? "matrix" : "pixels";
  }
  report["why"] = choice.why;
  report["pays"] = choice.pays;
  return report;
}

std::vector<NamedConfig> ways(const Sizes& x, const Sizes& out, const std::string& dtype,
                              int64_t groups, const Axes& kernel, const Axes& stride,
                              const Axes& padding, const Axes& dilation,
                              const std::variant<int, py::dict>& device) {
  const DType type = weight_dtype(dtype);
  const ConvShape s = shape_of(x, out, groups, kernel, stride, padding, dilation);
  std::vector<NamedConfig> names;
  if (is_empty(s)) return names;
  for_each_pixel_way(s, type, device_of(kOp, device),
                     [&](const CudaGemmConfig& config) { names.push_back(name_of(config)); });
  return names;
}

}  // namespace

void bind_conv_cuda(py::module_& m) {
  m.def("sparse24_conv_cuda", &bind_product, py::arg("out"), py::arg("x"), py::arg("panels"),
        py::arg("bias"), py::arg("groups"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("activation"), py::arg("workspace"),
        py::arg("counters"), py::arg("config") = py::none(),
        py::call_guard<py::gil_scoped_release>());
  m.def("sparse24_conv_choose_cuda", &choose, py::arg("x"), py::arg("out"), py::arg("dtype"),
        py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("device"));
  m.def("sparse24_conv_ways_cuda", &ways, py::arg("x"), py::arg("out"), py::arg("dtype"),
        py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("device"));
}

}  // namespace gossamer::sparse24
