// The border of products with an unstructured weight: what Python hands over is checked here, once.
// What the columns say is checked by csr_validate, once for each pattern: at every product it would
// take as long as that of a single row of x.
#include <pybind11/stl.h>

#include "common/border.h"
#include "common/py_tensor.h"
#include "csr/csr.h"

namespace py = pybind11;

namespace gossamer::csr {
namespace {

void check_columns(const char* op, const char* what, const TensorView& t, int64_t count,
                   int64_t k) {
  check_on_cpu(op, what, t);
  check_dtype(op, what, t, k <= kMostNarrow ? DType::kInt16 : DType::kInt32);
  check_vector(op, what, t, count);
}

Pattern checked_pattern(const char* op, const TensorView& crow, const TensorView& col, int64_t n,
                        int64_t k, int64_t count) {
  GOSSAMER_CHECK(n >= 1 && k >= 1 && k <= INT32_MAX && n <= INT32_MAX, op, ": a weight [", n, ", ",
                 k, "], expected sizes of 1 to 2**31 - 1");
  GOSSAMER_CHECK(count <= INT32_MAX, op, ": ", count, " values, at most 2**31 - 1");
  check_on_cpu(op, "crow_indices", crow);
  check_dtype(op, "crow_indices", crow, DType::kInt32);
  check_vector(op, "crow_indices", crow, n + 1);
  check_columns(op, "col_indices", col, count, k);
  return {n, k, crow.as<const int32_t>(), col.data, k > kMostNarrow};
}

// Rows of numbers whose columns are contiguous.
void check_rows(const char* op, const char* what, const TensorView& t, DType dtype, int64_t rows,
                int64_t columns) {
  check_on_cpu(op, what, t);
  check_matrix(op, what, t);
  check_dtype(op, what, t, dtype);
  check_shape(op, what, t, rows, columns);
  check_adjacent_columns(op, what, t);
}

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& values,
                 const TensorView& crow, const TensorView& col,
                 const std::optional<TensorView>& bias, const std::string& activation,
                 int threads) {
  constexpr const char* op = "csr_linear";
  check_weight_dtype(op, "values", values);
  check_matrix(op, "x", x);
  check_matrix(op, "out", out);
  const int64_t rows = x.shape[0], k = x.shape[1], n = out.shape[1];
  check_rows(op, "x", x, values.dtype, rows, k);
  check_rows(op, "out", out, values.dtype, rows, n);
  check_contiguous(op, "out", out);
  check_on_cpu(op, "values", values);
  check_vector(op, "values", values, values.numel());
  const Pattern pattern = checked_pattern(op, crow, col, n, k, values.shape[0]);
  validate_rows(op, pattern, values.shape[0]);
  linear({values.dtype, pattern, values.data, rows, x.data, x.strides[0],
          bias_of(op, bias, n, values.dtype, x), activation_of(op, activation), out.data, threads});
}

void bind_dvalues(const TensorView& out, const TensorView& dy, const TensorView& x,
                  const TensorView& crow, const TensorView& col, int threads) {
  constexpr const char* op = "csr_dvalues";
  check_weight_dtype(op, "x", x);
  check_matrix(op, "x", x);
  check_matrix(op, "dy", dy);
  const int64_t rows = x.shape[0], k = x.shape[1], n = dy.shape[1];
  check_rows(op, "x", x, x.dtype, rows, k);
  check_rows(op, "dy", dy, x.dtype, rows, n);
  check_on_cpu(op, "dvalues", out);
  check_dtype(op, "dvalues", out, x.dtype);
  check_vector(op, "dvalues", out, col.numel());
  const Pattern pattern = checked_pattern(op, crow, col, n, k, col.numel());
  validate_rows(op, pattern, col.numel());
  dvalues(
      {x.dtype, pattern, rows, dy.data, dy.strides[0], x.data, x.strides[0], out.data, threads});
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("csr_most_narrow") = kMostNarrow;
  m.def("csr_linear", &bind_linear, py::arg("out"), py::arg("x"), py::arg("values"),
        py::arg("crow_indices"), py::arg("col_indices"), py::arg("bias"), py::arg("activation"),
        py::arg("threads"), release());
  m.def("csr_dvalues", &bind_dvalues, py::arg("out"), py::arg("dy"), py::arg("x"),
        py::arg("crow_indices"), py::arg("col_indices"), py::arg("threads"), release());
  m.def(
      "csr_validate",
      [](const std::string& op, const TensorView& crow, const TensorView& col, int64_t n,
         int64_t k) {
        validate(op.c_str(), checked_pattern(op.c_str(), crow, col, n, k, col.numel()),
                 col.numel());
      },
      py::arg("op"), py::arg("crow_indices"), py::arg("col_indices"), py::arg("n"), py::arg("k"),
      release());
  m.def(
      "csr_fingerprint",
      [](const TensorView& crow, const TensorView& col, int64_t n, int64_t k) {
        constexpr const char* op = "csr_fingerprint";
        const Pattern pattern = checked_pattern(op, crow, col, n, k, col.numel());
        validate_rows(op, pattern, col.numel());
        return fingerprint(pattern);
      },
      py::arg("crow_indices"), py::arg("col_indices"), py::arg("n"), py::arg("k"), release());
  m.def(
      "csr_transpose",
      [](const TensorView& crow, const TensorView& col, int64_t n, int64_t k,
         const TensorView& crow_out, const TensorView& col_out, const TensorView& source) {
        constexpr const char* op = "csr_transpose";
        const Pattern pattern = checked_pattern(op, crow, col, n, k, col.numel());
        validate(op, pattern, col.numel());
        checked_pattern(op, crow_out, col_out, k, n, col.numel());
        check_on_cpu(op, "source", source);
        check_dtype(op, "source", source, DType::kInt32);
        check_vector(op, "source", source, col.numel());
        transpose(pattern, crow_out.as<int32_t>(), col_out.data, n > kMostNarrow,
                  source.as<int32_t>());
      },
      py::arg("crow_indices"), py::arg("col_indices"), py::arg("n"), py::arg("k"),
      py::arg("crow_out"), py::arg("col_out"), py::arg("source"), release());
  m.def(
      "csr_gather",
      [](const TensorView& out, const TensorView& values, const TensorView& source, int threads) {
        constexpr const char* op = "csr_gather";
        check_weight_dtype(op, "values", values);
        check_dtype(op, "out", out, values.dtype);
        check_dtype(op, "source", source, DType::kInt32);
        const int64_t count = values.numel();
        for (const auto& [what, t] :
             {std::pair{"out", out}, {"values", values}, {"source", source}}) {
          check_on_cpu(op, what, t);
          check_vector(op, what, t, count);
        }
        gather(values.data, source.as<const int32_t>(), count, size_of(values.dtype), out.data,
               threads);
      },
      py::arg("out"), py::arg("values"), py::arg("source"), py::arg("threads"), release());
  m.def(
      "csr_choose",
      [](int64_t rows, const std::string& dtype) {
        const DType type = dlpack::dtype_from_name(dtype);
        if (!is_weight_dtype(type)) throw py::type_error("csr_choose: no kernels for " + dtype);
        return report_of(choose(rows, type));
      },
      py::arg("rows"), py::arg("dtype"));
}

}  // namespace gossamer::csr
