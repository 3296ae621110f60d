// The border of the products that skip zero activations on a GPU.
#include <pybind11/stl.h>

#include <limits>

#include "actsparse/border_rows.h"
#include "actsparse/cuda.h"
#include "common/cuda_border.h"
#include "common/py_tensor.h"

namespace py = pybind11;

namespace gossamer::actsparse {
namespace {

// Chooses, checks the workspace against it, and launches. Of x and its like the rest is set.
void launch_linear(const char* op, CudaLinearArgs args, const TensorView& out,
                   const std::optional<TensorView>& workspace,
                   const std::optional<TensorView>& counters) {
  const CudaModule& module = cuda_module(op, out);
  if (args.m == 0 || args.n == 0) return;
  const bool aligned = is_aligned_weight(args.dtype, args.weight, args.weight_stride, args.n);
  args.config = choose_cuda_linear_config(args.dtype, args.m, args.n, args.k, aligned,
                                          module.device(out.device_index));
  const int64_t tiles = args.config.tiles(args.dtype, args.m, args.n);
  check_grid(op, tiles);
  const CudaWorkspace meeting = workspace_of(
      op, args.config.workspace_bytes(args.dtype, args.m, args.n), tiles, workspace, counters, out);
  args.workspace = static_cast<float*>(meeting.sums), args.counters = meeting.counters;
  module.actsparse->linear(args, stream_of(out));
}

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& weight,
                 const std::optional<TensorView>& bias, double threshold,
                 const std::string& activation, const std::optional<TensorView>& workspace,
                 const std::optional<TensorView>& counters) {
  constexpr const char* op = "actsparse_linear";
  check_operands(op, out, x, weight);
  check_gpu_dtype(op, "x", x.dtype);
  CudaLinearArgs args{};
  args.dtype = x.dtype;
  args.m = x.shape[0], args.k = weight.shape[0], args.n = weight.shape[1];
  check_shape(op, "x", x, args.m, args.k);
  check_shape(op, "out", out, args.m, args.n);
  args.x = x.data, args.x_stride = x.strides[0];
  args.weight = weight.data, args.weight_stride = weight.strides[0];
  args.bias = bias_of(op, bias, args.n, x.dtype, x);
  args.threshold = static_cast<float>(checked_threshold(op, threshold, x.dtype));
  args.activation = activation_of(op, activation);
  args.out = out.data;
  launch_linear(op, args, out, workspace, counters);
}

void bind_spikes(const TensorView& out, const TensorView& bits, const TensorView& weight,
                 const std::optional<TensorView>& bias, const std::optional<TensorView>& workspace,
                 const std::optional<TensorView>& counters) {
  constexpr const char* op = "spike_linear";
  check_matrix(op, "bits", bits);
  check_matrix(op, "weight_kn", weight);
  check_matrix(op, "out", out);
  check_weight_dtype(op, "weight_kn", weight);
  check_gpu_dtype(op, "weight_kn", weight.dtype);
  check_device(op, "bits", bits, "weight_kn", weight);
  check_device(op, "out", out, "weight_kn", weight);
  CudaLinearArgs args{};
  args.dtype = weight.dtype;
  args.m = bits.shape[0], args.k = weight.shape[0], args.n = weight.shape[1];
  check_dtype(op, "bits", bits, DType::kUInt8);
  check_shape(op, "bits", bits, args.m, ceil_div(args.k, 8));
  check_contiguous(op, "bits", bits);
  check_adjacent_columns(op, "weight_kn", weight);
  check_dtype(op, "out", out, weight.dtype);
  check_shape(op, "out", out, args.m, args.n);
  check_contiguous(op, "out", out);
  args.x = bits.data, args.x_stride = bits.shape[1], args.is_packed = true;
  args.weight = weight.data, args.weight_stride = weight.strides[0];
  args.bias = bias_of(op, bias, args.n, weight.dtype, weight);
  args.activation = Activation::kNone;
  args.out = out.data;
  launch_linear(op, args, out, workspace, counters);
}

CudaOutputsArgs outputs_of(const TensorView& x, const TensorView& weight) {
  CudaOutputsArgs args{};
  args.dtype = x.dtype;
  args.m = x.shape[0], args.n = weight.shape[0], args.k = weight.shape[1];
  args.x = x.data, args.x_stride = x.strides[0];
  args.weight = weight.data, args.weight_stride = weight.strides[0];
  return args;
}

void bind_outputs(const TensorView& out, const TensorView& x, const TensorView& weight,
                  const TensorView& wanted, const std::optional<TensorView>& bias,
                  const std::string& activation) {
  constexpr const char* op = "actsparse_outputs";
  check_operands(op, out, x, weight);
  check_gpu_dtype(op, "x", x.dtype);
  CudaOutputsArgs args = outputs_of(x, weight);
  check_shape(op, "x", x, args.m, args.k);
  check_shape(op, "out", out, args.m, args.n);
  check_matrix(op, "wanted", wanted);
  check_device(op, "wanted", wanted, "x", x);
  check_dtype(op, "wanted", wanted, DType::kUInt8);
  check_shape(op, "wanted", wanted, args.m, args.n);
  check_contiguous(op, "wanted", wanted);
  args.wanted = wanted.as<const uint8_t>();
  args.bias = bias_of(op, bias, args.n, x.dtype, x);
  args.activation = activation_of(op, activation);
  args.out = out.data;
  const CudaModule& module = cuda_module(op, x);
  args.blocks = int64_t{module.device(x.device_index).multiprocessors} * kLinearResident;
  GOSSAMER_CHECK(args.m <= std::numeric_limits<int32_t>::max() / args.blocks, op, ": ", args.m,
                 " rows, expected up to 2**31 / ", args.blocks);
  if (args.m > 0 && args.n > 0) module.actsparse->outputs(args, stream_of(x));
}

// Up to how many rows the kernel is for, of rows that lie as x does; 0 where there is none.
int64_t most_rows_of_outputs(const TensorView& x, const TensorView& weight) {
  check_matrix("actsparse_outputs", "x", x);
  check_matrix("actsparse_outputs", "weight", weight);
  if (!is_weight_dtype(weight.dtype) || weight.dtype == DType::kFloat64) return 0;
  if (weight.strides[1] != 1 && weight.shape[1] > 1) return 0;  // a copy would take longer
  return are_aligned_outputs(outputs_of(x, weight)) ? kOutputsMostRows : 1;
}

bool is_aligned(const TensorView& weight) {
  return is_aligned_weight(weight.dtype, weight.data, weight.strides[0], weight.shape[1]);
}

// Up to how many rows of x a kernel is for; 0 where there is none for the weight.
int64_t most_rows(const TensorView& weight) {
  check_matrix("actsparse_linear", "weight", weight);
  if (!is_weight_dtype(weight.dtype) || weight.dtype == DType::kFloat64) return 0;
  if (weight.strides[1] != 1 && weight.shape[1] > 1) return 0;  // a copy would take longer
  return is_aligned(weight) ? kLinearMostRows : 1;
}

int64_t workspace_bytes(int64_t rows, const TensorView& weight) {
  constexpr const char* op = "actsparse_linear";
  check_matrix(op, "weight", weight);
  const int64_t k = weight.shape[0], n = weight.shape[1];
  if (rows == 0 || n == 0) return 0;
  const CudaDevice device = cuda_module(op, weight).device(weight.device_index);
  const auto config =
      choose_cuda_linear_config(weight.dtype, rows, n, k, is_aligned(weight), device);
  return config.workspace_bytes(weight.dtype, rows, n);
}

py::dict choose(int64_t m, int64_t n, int64_t k, const std::string& dtype, bool aligned,
                const std::variant<int, py::dict>& device) {
  constexpr const char* op = "actsparse_choose_cuda";
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error(std::string(op) + ": no kernels for " + dtype);
  check_gpu_dtype(op, "dtype", type);
  GOSSAMER_CHECK(m >= 1 && n >= 1 && k >= 0, op, ": ", m, " rows, ", n, " outputs, ", k, " inputs");
  const CudaLinearConfig config =
      choose_cuda_linear_config(type, m, n, k, aligned, device_of(op, device));
  py::dict report;
  report["target"] = "sm_80";
  report["kernel"] = "rows";
  report["tile_tokens"] = config.tokens;
  report["tile_outputs"] = linear_columns(type);
  report["split_k"] = config.split_k;
  report["blocks"] = config.tiles(type, m, n) * config.split_k;
  report["workspace_bytes"] = config.workspace_bytes(type, m, n);
  return report;
}

}  // namespace

void bind_cuda(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("actsparse_cuda_rows", &most_rows, py::arg("weight"));
  m.def("actsparse_linear_cuda", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("threshold"), py::arg("activation"), py::arg("workspace"),
        py::arg("counters"), release());
  m.def("actsparse_outputs_cuda_rows", &most_rows_of_outputs, py::arg("x"), py::arg("weight"));
  m.def("actsparse_outputs_cuda", &bind_outputs, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("wanted"), py::arg("bias"), py::arg("activation"), release());
  m.def("spike_linear_cuda", &bind_spikes, py::arg("out"), py::arg("bits"), py::arg("weight_kn"),
        py::arg("bias"), py::arg("workspace"), py::arg("counters"), release());
  m.def("actsparse_workspace_bytes", &workspace_bytes, py::arg("rows"), py::arg("weight"));
  m.def("actsparse_choose_cuda", &choose, py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("dtype"), py::arg("aligned"), py::arg("device"));
}

}  // namespace gossamer::actsparse
