// The border of the products of experts: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <vector>

#include "common/border.h"
#include "common/py_tensor.h"
#include "grouped/grouped.h"

namespace py = pybind11;

namespace gossamer::grouped {
namespace {

template <class Index>
std::vector<int64_t> ends_of(const char* op, const TensorView& offsets, int64_t tokens) {
  const auto* given = offsets.as<const Index>();
  std::vector<int64_t> ends(given, given + offsets.shape[0]);
  int64_t before = 0;
  for (size_t e = 0; e < ends.size(); before = ends[e++]) {
    GOSSAMER_CHECK(ends[e] >= before, op, ": offsets[", e, "] is ", ends[e],
                   e == 0 ? ", below 0" : ", below the one before it, ",
                   e == 0 ? "" : std::to_string(before));
    GOSSAMER_CHECK(ends[e] <= tokens, op, ": offsets[", e, "] is ", ends[e], ", x has ", tokens,
                   " tokens");
  }
  GOSSAMER_CHECK(before == tokens, op, ": the last of the offsets is ", before, ", x has ", tokens,
                 " tokens");
  return ends;
}

std::vector<int64_t> checked_ends(const char* op, const TensorView& offsets, int64_t experts,
                                  int64_t tokens) {
  check_vector(op, "offsets", offsets, experts);
  if (offsets.dtype == DType::kInt32) return ends_of<int32_t>(op, offsets, tokens);
  if (offsets.dtype == DType::kInt64) return ends_of<int64_t>(op, offsets, tokens);
  throw py::type_error(std::string(op) + ": offsets are " + name(offsets.dtype) +
                       ", expected int32 or int64");
}

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& weights,
                 const TensorView& offsets, const std::optional<TensorView>& bias,
                 const std::string& activation, int threads) {
  constexpr const char* op = "grouped_linear";
  check_matrix(op, "x", x);
  check_matrix(op, "out", out);
  check_weight_dtype(op, "x", x);
  GOSSAMER_CHECK(weights.ndim == 3, op, ": weights have ", weights.ndim,
                 " dimensions, expected 3: [experts, N, K]");
  for (const auto& [what, t] :
       {std::pair{"out", out}, {"weights", weights}, {"offsets", offsets}}) {
    check_device(op, what, t, "x", x);
  }
  check_on_cpu(op, "x", x);
  const int64_t experts = weights.shape[0], n = weights.shape[1], k = weights.shape[2];
  GOSSAMER_CHECK(experts >= 1 && n >= 1 && k >= 1, op, ": weights have shape ", shape_text(weights),
                 ", expected at least [1, 1, 1]");
  check_dtype(op, "weights", weights, x.dtype);
  check_contiguous(op, "weights", weights);
  check_dtype(op, "out", out, x.dtype);
  check_shape(op, "x", x, x.shape[0], k);
  check_shape(op, "out", out, x.shape[0], n);
  check_contiguous(op, "out", out);
  check_adjacent_columns(op, "x", x);
  if (bias) {
    check_matrix(op, "bias", *bias);
    check_device(op, "bias", *bias, "x", x);
    check_dtype(op, "bias", *bias, x.dtype);
    check_shape(op, "bias", *bias, experts, n);
    check_contiguous(op, "bias", *bias);
  }
  const std::vector<int64_t> ends = checked_ends(op, offsets, experts, x.shape[0]);
  gemm({x.dtype, experts, n, k, x.data, x.strides[0], weights.data, bias ? bias->data : nullptr,
        ends.data(), activation_of(op, activation), out.data, threads});
}

}  // namespace

void bind(py::module_& m) {
  bind_gemm_cuda(m);
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("grouped_linear", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weights"),
        py::arg("offsets"), py::arg("bias"), py::arg("activation"), py::arg("threads"), release());
  m.def(
      "grouped_ends",
      [](const TensorView& offsets, int64_t experts, int64_t tokens) {
        check_on_cpu("grouped_linear", "offsets", offsets);
        return checked_ends("grouped_linear", offsets, experts, tokens);
      },
      py::arg("offsets"), py::arg("experts"), py::arg("tokens"));
  m.def(
      "grouped_choose",
      [](const std::string& dtype) {
        const DType type = dlpack::dtype_from_name(dtype);
        if (!is_weight_dtype(type)) {
          throw py::type_error("grouped_choose: no kernels for " + dtype);
        }
        return report_of(choose(type));
      },
      py::arg("dtype"));
}

}  // namespace gossamer::grouped
