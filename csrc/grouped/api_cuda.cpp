// The border of the products of experts on a GPU. What the offsets hold is not looked at here,
// which would have to wait for the GPU: the kernels stay within their memory whatever they say.
#include <pybind11/stl.h>

#include "common/border.h"
#include "common/cuda_border.h"
#include "common/py_tensor.h"
#include "grouped/cuda.h"
#include "grouped/grouped.h"

namespace py = pybind11;

namespace gossamer::grouped {
namespace {

struct Sizes {
  int64_t experts, tokens, n, k;
};

CudaGroupedConfig config_of(const char* op, DType dtype, CudaProduct product, const Sizes& sizes,
                            const CudaDevice& device) {
  const auto [experts, tokens, n, k] = sizes;
  const CudaGroupedConfig config =
      choose_cuda_config(dtype, product, experts, tokens, n, k, device);
  check_grid(op, config.blocks(product, experts, tokens, n, k));
  return config;
}

// Rows of tokens, any distance apart.
void check_tokens(const char* op, const char* what, const TensorView& t, int64_t tokens,
                  int64_t features) {
  check_matrix(op, what, t);
  check_shape(op, what, t, tokens, features);
  check_adjacent_columns(op, what, t);
}

void check_experts(const char* op, const char* what, const TensorView& t) {
  GOSSAMER_CHECK(t.ndim == 3, op, ": ", what, " has ", t.ndim, " dimensions, expected 3");
  check_contiguous(op, what, t);
}

void check_like(const char* op, const char* what, const TensorView& t, const TensorView& first) {
  check_device(op, what, t, "x", first);
  check_dtype(op, what, t, first.dtype);
}

void run(const char* op, CudaProduct product, const Sizes& sizes, const TensorView& offsets,
         const TensorView& tokens, const TensorView& other, const void* bias, Activation activation,
         const TensorView& out) {
  check_gpu_dtype(op, "x", tokens.dtype);
  check_vector(op, "offsets", offsets, sizes.experts);
  check_device(op, "offsets", offsets, "x", tokens);
  if (offsets.dtype != DType::kInt32 && offsets.dtype != DType::kInt64) {
    throw py::type_error(std::string(op) + ": offsets are " + name(offsets.dtype) +
                         ", expected int32 or int64");
  }
  const CudaModule& module = cuda_module(op, tokens);
  if (out.shape[0] == 0 || out.shape[1] == 0 || (out.ndim == 3 && out.shape[2] == 0)) return;
  if (sizes.experts == 0) return;
  const CudaGroupedConfig config =
      config_of(op, tokens.dtype, product, sizes, module.device(tokens.device_index));
  const auto [experts, count, n, k] = sizes;
  module.grouped->product(
      {tokens.dtype, product, experts, count, n, k, offsets.data, offsets.dtype == DType::kInt64,
       tokens.data, tokens.strides[0], other.data, other.ndim == 2 ? other.strides[0] : k, bias,
       activation, out.data, config},
      stream_of(tokens));
}

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& weights,
                 const TensorView& offsets, const std::optional<TensorView>& bias,
                 const std::string& activation) {
  constexpr const char* op = "grouped_linear";
  check_matrix(op, "x", x);
  check_experts(op, "weights", weights);
  const Sizes sizes{weights.shape[0], x.shape[0], weights.shape[1], weights.shape[2]};
  check_tokens(op, "x", x, sizes.tokens, sizes.k);
  check_tokens(op, "out", out, sizes.tokens, sizes.n);
  check_contiguous(op, "out", out);
  check_like(op, "weights", weights, x);
  check_like(op, "out", out, x);
  if (bias) {
    check_matrix(op, "bias", *bias);
    check_like(op, "bias", *bias, x);
    check_shape(op, "bias", *bias, sizes.experts, sizes.n);
    check_contiguous(op, "bias", *bias);
  }
  run(op, CudaProduct::kForward, sizes, offsets, x, weights, bias ? bias->data : nullptr,
      activation_of(op, activation), out);
}

void bind_input(const TensorView& dx, const TensorView& dy, const TensorView& weights,
                const TensorView& offsets) {
  constexpr const char* op = "grouped_input";
  check_matrix(op, "dy", dy);
  check_experts(op, "weights", weights);
  const Sizes sizes{weights.shape[0], dy.shape[0], weights.shape[1], weights.shape[2]};
  check_tokens(op, "dy", dy, sizes.tokens, sizes.n);
  check_tokens(op, "out", dx, sizes.tokens, sizes.k);
  check_contiguous(op, "out", dx);
  check_like(op, "weights", weights, dy);
  check_like(op, "out", dx, dy);
  run(op, CudaProduct::kInput, sizes, offsets, dy, weights, nullptr, Activation::kNone, dx);
}

void bind_weight(const TensorView& dw, const TensorView& dy, const TensorView& x,
                 const TensorView& offsets) {
  constexpr const char* op = "grouped_weight";
  check_matrix(op, "dy", dy);
  check_experts(op, "out", dw);
  const Sizes sizes{dw.shape[0], dy.shape[0], dw.shape[1], dw.shape[2]};
  check_tokens(op, "dy", dy, sizes.tokens, sizes.n);
  check_tokens(op, "x", x, sizes.tokens, sizes.k);
  check_like(op, "x", x, dy);
  check_like(op, "out", dw, dy);
  run(op, CudaProduct::kWeight, sizes, offsets, dy, x, nullptr, Activation::kNone, dw);
}

CudaProduct product_of(const char* op, const std::string& text) {
  if (text == "linear") return CudaProduct::kForward;
  if (text == "input") return CudaProduct::kInput;
  if (text == "weight") return CudaProduct::kWeight;
  fail(op, ": product '", text, "' is unknown; linear, input or weight");
}

py::dict choose_cuda(const std::string& product, const std::string& dtype, int64_t experts,
                     int64_t tokens, int64_t n, int64_t k,
                     const std::variant<int, py::dict>& device) {
  constexpr const char* op = "grouped_choose_cuda";
  const DType type = dlpack::dtype_from_name(dtype);
  check_gpu_dtype(op, "dtype", type);
  GOSSAMER_CHECK(experts >= 1 && tokens >= 0 && n >= 1 && k >= 1, op, ": ", experts, " experts of ",
                 n, " x ", k, " for ", tokens, " tokens");
  const CudaProduct which = product_of(op, product);
  const CudaDevice gpu = device_of(op, device);
  const CudaGroupedConfig config = config_of(op, type, which, {experts, tokens, n, k}, gpu);
  py::dict report;
  report["target"] = "sm_80";
  report["kernel"] = name(config.kernel);
  report["why"] = config.kernel == CudaGroupedKernel::kMma
                      ? "tensor cores; each finds its expert by the offsets"
                      : "exact, which tensor cores are not";
  report["tile_rows"] = config.rows();
  report["tile_columns"] = config.columns();
  report["blocks"] = config.blocks(which, experts, tokens, n, k);
  report["capability"] = gpu.capability;
  return report;
}

}  // namespace

void bind_gemm_cuda(py::module_& m) {
  m.def("grouped_linear_cuda", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weights"),
        py::arg("offsets"), py::arg("bias"), py::arg("activation"));
  m.def("grouped_input_cuda", &bind_input, py::arg("out"), py::arg("dy"), py::arg("weights"),
        py::arg("offsets"));
  m.def("grouped_weight_cuda", &bind_weight, py::arg("out"), py::arg("dy"), py::arg("x"),
        py::arg("offsets"));
  m.def("grouped_choose_cuda", &choose_cuda, py::arg("product"), py::arg("dtype"),
        py::arg("experts"), py::arg("tokens"), py::arg("n"), py::arg("k"), py::arg("device"));
}

}  // namespace gossamer::grouped
