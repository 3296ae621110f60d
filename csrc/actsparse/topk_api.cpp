// The border of k-sparse codes: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <atomic>
#include <limits>

#include "actsparse/topk.h"
#include "common/border.h"
#include "common/parallel.h"
#include "common/py_tensor.h"
#include "common/scratch.h"

namespace py = pybind11;

namespace gossamer::actsparse::topk {
namespace {

thread_local Scratch rows_scratch, scales_scratch;

// [rows, columns] of the dtype on the CPU, its columns contiguous.
void check_rows(const char* op, const char* what, const TensorView& t, DType dtype, int64_t rows,
                int64_t columns) {
  check_on_cpu(op, what, t);
  check_matrix(op, what, t);
  check_dtype(op, what, t, dtype);
  check_shape(op, what, t, rows, columns);
  check_adjacent_columns(op, what, t);
}

void check_out(const char* op, const TensorView& out, DType dtype, int64_t rows, int64_t columns) {
  check_rows(op, "out", out, dtype, rows, columns);
  check_contiguous(op, "out", out);
}

// The matrix that indices point into.
void check_weight(const char* op, const TensorView& weight) {
  check_on_cpu(op, "weight", weight);
  check_matrix(op, "weight", weight);
  check_weight_dtype(op, "weight", weight);
  check_rows(op, "weight", weight, weight.dtype, weight.shape[0], weight.shape[1]);
}

template <class Index>
const uint32_t* checked_rows_of(const char* op, const TensorView& indices, int64_t width,
                                int threads) {
  const auto* given = indices.as<const Index>();
  const int64_t count = indices.numel(), k = indices.shape[1];
  uint32_t* rows = nullptr;
  if constexpr (sizeof(Index) != 4) rows = static_cast<uint32_t*>(rows_scratch.at_least(count * 4));
  std::atomic<int64_t> wrong{count};
  parallel_ranges(threads_for_bytes(threads, count * int64_t{sizeof(Index)}), count,
                  [&](int64_t first, int64_t last) {
                    bool inside = true;
                    for (int64_t i = first; i < last; ++i) {
                      // As unsigned a negative one is too large, too.
                      inside &= static_cast<uint64_t>(given[i]) < static_cast<uint64_t>(width);
                      if constexpr (sizeof(Index) != 4) rows[i] = static_cast<uint32_t>(given[i]);
                    }
                    if (inside) return;
                    int64_t at = first;
                    while (static_cast<uint64_t>(given[at]) < static_cast<uint64_t>(width)) ++at;
                    int64_t lowest = wrong.load();
                    while (at < lowest && !wrong.compare_exchange_weak(lowest, at)) {
                    }
                  });
  const int64_t at = wrong.load();
  if (at < count) {
    fail(op, ": indices[", at / k, ", ", at % k, "] is ", given[at], ", expected 0 to ", width - 1);
  }
  if constexpr (sizeof(Index) == 4) rows = indices.as<uint32_t>();
  return rows;
}

// The indices [tokens, k] into `width` rows, all of them inside: in the scratch of this thread
// unless they have 32 bits already.
const uint32_t* checked_rows(const char* op, const TensorView& indices, int64_t width,
                             int threads) {
  check_on_cpu(op, "indices", indices);
  check_matrix(op, "indices", indices);
  check_contiguous(op, "indices", indices);
  GOSSAMER_CHECK(width <= std::numeric_limits<int32_t>::max(), op, ": the weight has ", width,
                 " rows, expected below 2^31");
  if (indices.dtype == DType::kInt32) return checked_rows_of<int32_t>(op, indices, width, threads);
  if (indices.dtype == DType::kInt64) return checked_rows_of<int64_t>(op, indices, width, threads);
  throw py::type_error(std::string(op) + ": indices are " + name(indices.dtype) +
                       ", expected int32 or int64");
}

// values [tokens, k] as the kernels want them: float, double as it is.
const void* scales_of(const char* op, const TensorView& values, DType dtype,
                      const TensorView& indices, int threads) {
  check_rows(op, "values", values, dtype, indices.shape[0], indices.shape[1]);
  check_contiguous(op, "values", values);
  if (size_of(dtype) > 2) return values.data;
  const int64_t count = values.numel();
  auto* scales = static_cast<float*>(scales_scratch.at_least(count * 4));
  widen(dtype, values.data, count, scales, threads);
  return scales;
}

void bind_decode(const TensorView& out, const TensorView& values, const TensorView& indices,
                 const TensorView& weight, const std::optional<TensorView>& bias, int threads) {
  constexpr const char* op = "topk_decode";
  check_weight(op, weight);
  const int64_t width = weight.shape[0], columns = weight.shape[1];
  const uint32_t* rows = checked_rows(op, indices, width, threads);
  const int64_t tokens = indices.shape[0], k = indices.shape[1];
  const void* scales = scales_of(op, values, weight.dtype, indices, threads);
  check_out(op, out, weight.dtype, tokens, columns);
  const void* added = bias_of(op, bias, columns, weight.dtype, weight);
  sum_bags({weight.dtype, tokens, columns, k, nullptr, rows, scales, weight.data, width,
            weight.strides[0], added, out.data, threads});
}

void bind_values(const TensorView& out, const TensorView& dy, const TensorView& indices,
                 const TensorView& weight, int threads) {
  constexpr const char* op = "topk_values";
  check_weight(op, weight);
  const int64_t columns = weight.shape[1];
  const uint32_t* rows = checked_rows(op, indices, weight.shape[0], threads);
  const int64_t tokens = indices.shape[0], k = indices.shape[1];
  check_rows(op, "dy", dy, weight.dtype, tokens, columns);
  check_out(op, out, weight.dtype, tokens, k);
  dot_rows({weight.dtype, tokens, k, columns, rows, dy.data, dy.strides[0], weight.data,
            weight.strides[0], out.data, threads});
}

template <class Real>
void sum_by_row(Bags bags, const uint32_t* rows, const void* scales, int64_t k) {
  const auto sorted = sort_by_row(rows, static_cast<const Real*>(scales), bags.matrix_rows, k,
                                  bags.bags, bags.threads);
  bags.begins = sorted.begins.data();
  bags.rows = sorted.tokens.data();
  bags.scales = sorted.scales.data();
  sum_bags(bags);
}

void bind_weight(const TensorView& out, const TensorView& values, const TensorView& indices,
                 const TensorView& dy, int threads) {
  constexpr const char* op = "topk_weight";
  check_on_cpu(op, "dy", dy);
  check_matrix(op, "dy", dy);
  check_weight_dtype(op, "dy", dy);
  check_matrix(op, "out", out);
  const int64_t width = out.shape[0], columns = dy.shape[1];
  check_out(op, out, dy.dtype, width, columns);
  const uint32_t* rows = checked_rows(op, indices, width, threads);
  const int64_t tokens = indices.shape[0], k = indices.shape[1];
  check_rows(op, "dy", dy, dy.dtype, tokens, columns);
  const void* scales = scales_of(op, values, dy.dtype, indices, threads);
  GOSSAMER_CHECK(tokens <= std::numeric_limits<int32_t>::max(), op, ": ", tokens,
                 " tokens, expected below 2^31");
  if (width == 0) return;
  const Bags bags{dy.dtype, width,  columns,       0,       nullptr,  nullptr, nullptr,
                  dy.data,  tokens, dy.strides[0], nullptr, out.data, threads};
  if (dy.dtype == DType::kFloat64) {
    sum_by_row<double>(bags, rows, scales, k);
  } else {
    sum_by_row<float>(bags, rows, scales, k);
  }
}

// The codes [tokens, k] and the matrix [tokens, width] of the same, which `op` makes of each other.
DenseCodes dense_codes(const char* op, const TensorView& dense, const TensorView& values,
                       const TensorView& indices, int threads) {
  check_on_cpu(op, "the dense codes", dense);
  check_matrix(op, "the dense codes", dense);
  check_weight_dtype(op, "the dense codes", dense);
  const int64_t width = dense.shape[1];
  const uint32_t* rows = checked_rows(op, indices, width, threads);
  const int64_t tokens = indices.shape[0], k = indices.shape[1];
  check_rows(op, "values", values, dense.dtype, tokens, k);
  check_contiguous(op, "values", values);
  check_rows(op, "the dense codes", dense, dense.dtype, tokens, width);
  check_contiguous(op, "the dense codes", dense);
  return {dense.dtype, tokens, k, width, rows, nullptr, nullptr, threads};
}

bool bind_scatter(const std::string& op, const TensorView& dense, const TensorView& values,
                  const TensorView& indices, int threads) {
  DenseCodes codes = dense_codes(op.c_str(), dense, values, indices, threads);
  codes.from = values.data, codes.to = dense.data;
  return scatter(codes);
}

void bind_gather(const std::string& op, const TensorView& values, const TensorView& dense,
                 const TensorView& indices, int threads) {
  DenseCodes codes = dense_codes(op.c_str(), dense, values, indices, threads);
  codes.from = dense.data, codes.to = values.data;
  gather(codes);
}

void bind_select(const TensorView& values, const TensorView& indices, const TensorView& dense,
                 bool relu, int threads) {
  constexpr const char* op = "topk_select";
  check_on_cpu(op, "dense", dense);
  check_matrix(op, "dense", dense);
  check_weight_dtype(op, "dense", dense);
  check_contiguous(op, "dense", dense);
  const int64_t rows = dense.shape[0], width = dense.shape[1];
  check_matrix(op, "values", values);
  const int64_t k = values.shape[1];
  GOSSAMER_CHECK(1 <= k && k <= width, op, ": k is ", k, ", expected 1 to ", width);
  GOSSAMER_CHECK(width <= std::numeric_limits<int32_t>::max(), op, ": ", width,
                 " columns, expected below 2^31");
  check_rows(op, "values", values, dense.dtype, rows, k);
  check_contiguous(op, "values", values);
  check_rows(op, "indices", indices, DType::kInt64, rows, k);
  check_contiguous(op, "indices", indices);
  select(
      {dense.dtype, rows, width, k, dense.data, relu, values.data, indices.as<int64_t>(), threads});
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("topk_decode", &bind_decode, py::arg("out"), py::arg("values"), py::arg("indices"),
        py::arg("weight"), py::arg("bias"), py::arg("threads"), release());
  m.def("topk_values", &bind_values, py::arg("out"), py::arg("dy"), py::arg("indices"),
        py::arg("weight"), py::arg("threads"), release());
  m.def("topk_weight", &bind_weight, py::arg("out"), py::arg("values"), py::arg("indices"),
        py::arg("dy"), py::arg("threads"), release());
  m.def("topk_scatter", &bind_scatter, py::arg("op"), py::arg("dense"), py::arg("values"),
        py::arg("indices"), py::arg("threads"), release());
  m.def("topk_gather", &bind_gather, py::arg("op"), py::arg("values"), py::arg("dense"),
        py::arg("indices"), py::arg("threads"), release());
  m.def("topk_select", &bind_select, py::arg("values"), py::arg("indices"), py::arg("dense"),
        py::arg("relu"), py::arg("threads"), release());
}

}  // namespace gossamer::actsparse::topk
