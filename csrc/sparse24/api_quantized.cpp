// The border of the quantised GEMM on either device: what Python hands over is checked here, once.
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

// The scales of a weight of this type, one a row or, of int4, for each `group` columns of a row.
const float* scales_of(const TensorView& scales, DType dtype, int64_t n, int64_t k, int64_t group) {
  check_matrix(kOp, "scales", scales);
  check_dtype(kOp, "scales", scales, DType::kFloat32);
  check_size(kOp, n, k);
  const bool grouped = dtype == DType::kUInt8 && group >= 4 && group % 4 == 0 && group < k;
  GOSSAMER_CHECK(group == k || grouped, kOp, ": group is ", group, " of ", k, " columns of ",
                 name(dtype), ", expected ", k, " or, of int4 weights, a multiple of 4");
  check_shape(kOp, "scales", scales, n, (k + group - 1) / group);
  check_contiguous(kOp, "scales", scales);
  return scales.as<const float>();
}

void check_value_dtype(DType t) {
  if (!is_quantized_dtype(t)) {
    throw py::type_error(std::string(kOp) + ": values are " + name(t) +
                         ", expected int8, float8_e4m3fn or uint8 (int4)");
  }
}

QuantizedWeight quantized_panels(const TensorView& t, DType dtype, const TensorView& scales,
                                 int64_t n, int64_t k, int64_t group) {
  check_device(kOp, "scales", scales, "the weight", t);
  const float* scale = scales_of(scales, dtype, n, k, group);
  return {panels(kOp, t, dtype, n, k), group, scale};
}

QuantizedWeight quantized(const TensorView& values, const TensorView& indices,
                          const TensorView& scales, int64_t n, int64_t k, int64_t group) {
  check_value_dtype(values.dtype);
  check_device(kOp, "scales", scales, "values", values);
  const float* scale = scales_of(scales, values.dtype, n, k, group);
  return {stored_weight(kOp, values, indices, n, k), group, scale};
}

// The scale of each row of an x of 8 bits; null for any other, which has none.
const float* x_scales_of(const std::optional<TensorView>& x_scale, const TensorView& x) {
  GOSSAMER_CHECK(x_scale.has_value() != is_floating(x.dtype), kOp, ": x is ", name(x.dtype),
                 x_scale ? " with an x_scale" : " with no x_scale",
                 "; an x of 8 bits has one, any other x has none");
  if (!x_scale) return nullptr;
  check_device(kOp, "x_scale", *x_scale, "x", x);
  check_dtype(kOp, "x_scale", *x_scale, DType::kFloat32);
  check_vector(kOp, "x_scale", *x_scale, x.shape[0]);
  return x_scale->as<const float>();
}

void check_out(const TensorView& out, int64_t m, int64_t n) {
  if (!is_floating(out.dtype)) {
    throw py::type_error(std::string(kOp) + ": out is " + name(out.dtype) +
                         ", expected float32, bfloat16 or float16");
  }
  check_shape(kOp, "out", out, m, n);
  check_contiguous(kOp, "out", out);
}

void bind_linear_quantized(const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& x_scale, const TensorView& weight,
                           const std::optional<TensorView>& indices, const std::string& value_dtype,
                           const TensorView& scales, const std::optional<TensorView>& bias,
                           int64_t group, const std::string& activation, int threads) {
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "out", out);
  check_on_cpu(kOp, "x", x);
  check_device(kOp, "out", out, "x", x);
  check_device(kOp, "the weight", weight, "x", x);
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  const QuantizedWeight w =
      indices ? quantized(weight, *indices, scales, n, k, group)
              : quantized_panels(weight, panel_dtype(value_dtype, true), scales, n, k, group);
  if (!is_floating(x.dtype) && (w.four_bit() || x.dtype != w.dtype)) {
    throw py::type_error(std::string(kOp) + ": x is " + name(x.dtype) +
                         ", expected float32, bfloat16, float16" +
                         (w.four_bit() ? "" : std::string(" or ") + name(w.dtype)));
  }
  check_adjacent_columns(kOp, "x", x);
  const float* x_scales = x_scales_of(x_scale, x);
  check_out(out, m, n);
  gemm_quantized({w, m, x.dtype, x.data, x.strides[0], x_scales, out.dtype,
                  bias_of(kOp, bias, n, out.dtype, x), activation_of(kOp, activation), out.data,
                  threads});
}

void bind_quantize_rows(const TensorView& x, const TensorView& numbers, const TensorView& scales,
                        int threads) {
  constexpr const char* op = "quantize_rows";
  check_matrix(op, "x", x);
  check_on_cpu(op, "x", x);
  if (!is_floating(x.dtype)) {
    throw py::type_error(std::string(op) + ": x is " + name(x.dtype) +
                         ", expected float32, bfloat16 or float16");
  }
  if (numbers.dtype != DType::kInt8 && numbers.dtype != DType::kE4M3) {
    throw py::type_error(std::string(op) + ": numbers are " + name(numbers.dtype) +
                         ", expected int8 or float8_e4m3fn");
  }
  check_dtype(op, "scales", scales, DType::kFloat32);
  check_vector(op, "scales", scales, x.shape[0]);
  check_shape(op, "numbers", numbers, x.shape[0], x.shape[1]);
  for (const auto& [what, t] : {std::pair{"x", &x}, {"numbers", &numbers}, {"scales", &scales}}) {
    check_contiguous(op, what, *t);
    check_device(op, what, *t, "x", x);
  }
  quantize_rows({x.shape[0], x.shape[1], x.dtype, x.data, x.shape[1], numbers.dtype, numbers.data,
                 scales.as<float>(), threads});
}

// ---- on a GPU -----------------------------------------------------------------------------------

// The columns of a step of its sparse products: no scale may change within one.
constexpr int64_t kGroupMultiple = 32;

void check_cuda_kernel(const TensorView& x, DType stored, int64_t k, int64_t group) {
  if (stored != DType::kUInt8 && x.dtype != stored) {
    throw py::type_error(std::string(kOp) + ": x is " + name(x.dtype) + ", expected " +
                         name(stored));
  }
  if (stored == DType::kUInt8 && x.dtype != DType::kBFloat16 && x.dtype != DType::kFloat16) {
    throw py::type_error(std::string(kOp) + ": x is " + name(x.dtype) +
                         ", int4 weights on a GPU are multiplied with bfloat16 and float16 only");
  }
  GOSSAMER_CHECK(stored != DType::kUInt8 || group == k || group % kGroupMultiple == 0, kOp,
                 ": group is ", group, " of ", k, " columns, on a GPU expected ", k,
                 " or a multiple of ", kGroupMultiple);
  GOSSAMER_CHECK(stored != DType::kInt8 || k <= kMaxInt8Columns, kOp, ": ", k,
                 " columns of int8, whose sums on a GPU may pass 32 bits above ", kMaxInt8Columns);
}

void bind_linear_quantized_cuda(const TensorView& out, const TensorView& x,
                                const std::optional<TensorView>& x_scale, const TensorView& weight,
                                const std::string& value_dtype, const TensorView& scales,
                                const std::optional<TensorView>& bias, int64_t group,
                                const std::string& activation,
                                const std::optional<TensorView>& workspace,
                                const std::optional<TensorView>& counters,
                                const std::optional<NamedConfig>& config) {
  cuda_kernels(kOp, x);  // or what panels() says would be about the CPU's
  check_matrix(kOp, "x", x);
  check_matrix(kOp, "out", out);
  check_device(kOp, "out", out, "x", x);
  check_device(kOp, "the weight", weight, "x", x);
  check_device(kOp, "scales", scales, "x", x);
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  const DType stored = panel_dtype(value_dtype, true);
  check_value_dtype(stored);
  CudaGemmArgs args{};
  args.dtype = x.dtype;
  args.m = m, args.n = n, args.k = k;
  args.panels = panels(kOp, weight, stored, n, k).panels;
  args.row_scales = scales_of(scales, stored, n, k, group);
  args.group = stored == DType::kUInt8 ? group : 0;
  check_cuda_kernel(x, stored, k, group);
  check_aligned_rows(kOp, x);
  args.x = x.data;
  args.x_stride = x.strides[0];
  args.x_scales = x_scales_of(x_scale, x);
  check_out(out, m, n);
  args.out = out.data;
  args.out_dtype = out.dtype;
  args.bias = bias_of(kOp, bias, n, out.dtype, x);
  args.activation = activation_of(kOp, activation);
  launch_gemm(kOp, args, stored, x, workspace, counters, config);
}

}  // namespace

void bind_quantized(py::module_& m) {
  m.def("sparse24_linear_quantized", &bind_linear_quantized, py::arg("out"), py::arg("x"),
        py::arg("x_scale"), py::arg("weight"), py::arg("indices"), py::arg("value_dtype"),
        py::arg("scales"), py::arg("bias"), py::arg("group"), py::arg("activation"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("quantize_rows", &bind_quantize_rows, py::arg("x"), py::arg("numbers"), py::arg("scales"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("sparse24_linear_quantized_cuda", &bind_linear_quantized_cuda, py::arg("out"), py::arg("x"),
        py::arg("x_scale"), py::arg("panels"), py::arg("value_dtype"), py::arg("scales"),
        py::arg("bias"), py::arg("group"), py::arg("activation"), py::arg("workspace"),
        py::arg("counters"), py::arg("config") = py::none(),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace gossamer::sparse24
