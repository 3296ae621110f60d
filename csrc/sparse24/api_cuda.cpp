// The border of the product on a GPU.
#include <pybind11/stl.h>

#include <variant>

#include "common/py_tensor.h"
#include "sparse24/api.h"
#include "sparse24/choose_gemm_cuda.h"

namespace py = pybind11;

namespace gossamer::sparse24 {

const CudaKernels& cuda_kernels(const char* op, const TensorView& t) {
  return *cuda_module(op, t).sparse24;
}

void check_aligned_rows(const char* op, const TensorView& x) {
  const int64_t m = x.shape[0], k = x.shape[1], row_bytes = x.strides[0] * size_of(x.dtype);
  const bool pitch_fits = row_bytes % 16 == 0 && x.strides[0] >= k;
  GOSSAMER_CHECK((k <= 1 || m == 0 || x.strides[1] == 1) && (m <= 1 || pitch_fits) &&
                     reinterpret_cast<uintptr_t>(x.data) % 16 == 0,
                 op, ": x with strides [", x.strides[0], ", ", x.strides[1],
                 "] does not begin each row at a multiple of 16 bytes past the end of the last");
}

namespace {

void check_product(const char* op, DType stored, const CudaDevice& device) {
  const int has = device.capability;
  GOSSAMER_CHECK(stored != DType::kE4M3 || has_float8(has), op, ": compute capability ", has / 10,
                 ".", has % 10,
                 " has no sparse product of float8_e4m3fn that is worth having; 8.9, "
                 "9.0 and 12.x have, and this GPU has those of int8, int4, bfloat16 and float16");
}

CudaGemmConfig config_of(const char* op, const NamedConfig& given, const CudaGemmArgs& args,
                         DType stored, const CudaDevice& device) {
  const auto& [kernel, tile_n, tile_m, warps_k, split_k, blocks] = given;
  for (const CudaKernel each :
       {CudaKernel::kDecode, CudaKernel::kPrefill, CudaKernel::kWgmma, CudaKernel::kStream}) {
    if (name(each) != kernel) continue;
    const CudaGemmConfig config{each, tile_n, tile_m, warps_k, split_k, blocks};
    if (can_run(config, args.m, args.n, args.k, stored, device)) return config;
  }
  fail(op, ": no kernel multiplies ", args.m, " rows by [", args.n, ", ", args.k, "] of ",
       name(stored), " as ", kernel, " ", tile_n, " x ", tile_m, ", warps_k ", warps_k,
       ", split_k ", split_k, ", blocks ", blocks);
}

}  // namespace

void launch_gemm(const char* op, CudaGemmArgs args, DType stored, const TensorView& x,
                 const std::optional<TensorView>& workspace,
                 const std::optional<TensorView>& counters,
                 const std::optional<NamedConfig>& config) {
  if (args.m == 0) return;
  const CudaModule& module = cuda_module(op, x);
  const CudaDevice device = module.device(x.device_index);
  check_product(op, stored, device);
  args.config = config ? config_of(op, *config, args, stored, device)
                       : choose_cuda_gemm_config(args.m, args.n, args.k, stored, device);
  const CudaWorkspace meeting = workspace_of(op, workspace_bytes(args.config, args.m, args.n),
                                             kCudaCounters, workspace, counters, x);
  args.workspace = meeting.sums, args.counters = meeting.counters;
  module.sparse24->gemm(args, stream_of(x));
}

namespace {

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& weight,
                 const std::optional<TensorView>& bias, const std::string& activation,
                 const std::optional<TensorView>& workspace,
                 const std::optional<TensorView>& counters,
                 const std::optional<NamedConfig>& config) {
  constexpr const char* op = "sparse24_linear";
  cuda_kernels(op, x);  // or what panels() says would be about the CPU's
  check_matrix(op, "x", x);
  check_matrix(op, "out", out);
  check_device(op, "out", out, "x", x);
  check_device(op, "the weight", weight, "x", x);
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  const Weight w = panels(op, weight, panel_dtype(name(x.dtype)), n, k);
  check_dtype(op, "out", out, x.dtype);
  check_shape(op, "out", out, m, n);
  check_contiguous(op, "out", out);
  check_aligned_rows(op, x);
  CudaGemmArgs args{};
  args.dtype = args.out_dtype = x.dtype;
  args.m = m, args.n = n, args.k = k;
  args.panels = w.panels;
  args.x = x.data;
  args.x_stride = x.strides[0];
  args.bias = bias_of(op, bias, n, x.dtype, x);
  args.activation = activation_of(op, activation);
  args.out = out.data;
  launch_gemm(op, args, x.dtype, x, workspace, counters, config);
}

py::dict choose(int64_t m, int64_t n, int64_t k, const std::string& dtype,
                const std::variant<int, py::dict>& device) {
  constexpr const char* op = "sparse24_choose_cuda";
  GOSSAMER_CHECK(m >= 1 && m <= int64_t{1} << 40, op, ": m is ", m, ", expected 1 to 2**40");
  check_size(op, n, k);
  const DType type = panel_dtype(dtype, true);
  const CudaDevice traits = device_of(op, device);
  check_product(op, type, traits);
  const CudaGemmConfig config = choose_cuda_gemm_config(m, n, k, type, traits);
  py::dict report = report_of(config, workspace_bytes(config, m, n));
  report["why"] = reason(config.kernel, m);
  return report;
}

}  // namespace

py::dict report_of(const CudaGemmConfig& config, int64_t workspace_bytes) {
  py::dict report;
  const bool hopper = config.kernel == CudaKernel::kWgmma || config.kernel == CudaKernel::kStream;
  report["target"] = hopper ? "sm_90" : "sm_80";
  report["kernel"] = name(config.kernel);
  report["tile_n"] = config.tile_n;
  report["tile_m"] = config.tile_m;
  report["warps_k"] = config.warps_k;
  report["split_k"] = config.split_k;
  report["blocks"] = config.blocks;
  report["workspace_bytes"] = workspace_bytes;
  return report;
}

void bind_cuda(py::module_& m) {
  m.attr("cuda_counters") = kCudaCounters;
  m.attr("cuda_most_workspace_bytes") = kMaxWorkspaceBytes;
  m.def("sparse24_linear_cuda", &bind_linear, py::arg("out"), py::arg("x"), py::arg("panels"),
        py::arg("bias"), py::arg("activation"), py::arg("workspace"), py::arg("counters"),
        py::arg("config") = py::none(), py::call_guard<py::gil_scoped_release>());
  m.def("sparse24_choose_cuda", &choose, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("device"));
}

}  // namespace gossamer::sparse24
