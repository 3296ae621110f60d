// The border of k-sparse codes on a GPU. Indices are not looked at here, which would have to wait
// for the GPU.
#include <pybind11/stl.h>

#include "actsparse/topk.h"
#include "actsparse/topk_cuda.h"
#include "common/border.h"
#include "common/ceil_div.h"
#include "common/cuda_border.h"
#include "common/py_tensor.h"

namespace py = pybind11;

namespace gossamer::actsparse::topk {
namespace {

// The first operand of a call: [rows, columns], its columns contiguous.
void check_first(const char* op, const char* what, const TensorView& t) {
  check_matrix(op, what, t);
  check_weight_dtype(op, what, t);
  check_gpu_dtype(op, what, t.dtype);
  check_adjacent_columns(op, what, t);
}

// [rows, columns] of the dtype and on the device of the first.
void check_rows(const char* op, const char* what, const TensorView& t, DType dtype, int64_t rows,
                int64_t columns, const char* first_name, const TensorView& first) {
  check_device(op, what, t, first_name, first);
  check_matrix(op, what, t);
  check_dtype(op, what, t, dtype);
  check_shape(op, what, t, rows, columns);
  check_adjacent_columns(op, what, t);
}

void check_out(const char* op, const TensorView& out, DType dtype, int64_t rows, int64_t columns,
               const char* first_name, const TensorView& first) {
  check_rows(op, "out", out, dtype, rows, columns, first_name, first);
  check_contiguous(op, "out", out);
}

CudaCodes codes_of(const char* op, const TensorView& indices, const TensorView* values,
                   int64_t width, const char* first_name, const TensorView& first) {
  check_device(op, "indices", indices, first_name, first);
  check_matrix(op, "indices", indices);
  check_contiguous(op, "indices", indices);
  if (indices.dtype != DType::kInt32 && indices.dtype != DType::kInt64) {
    throw py::type_error(std::string(op) + ": indices are " + name(indices.dtype) +
                         ", expected int32 or int64");
  }
  const int64_t pairs = indices.numel(), k = indices.shape[1];
  GOSSAMER_CHECK(width <= kMostCounted && pairs <= kMostCounted, op, ": ", pairs,
                 " pairs of a value and one of ", width,
                 " rows, a GPU's kernels count to 2**31 - 1");
  GOSSAMER_CHECK(width > 0 || pairs == 0, op, ": indices of shape ", shape_text(indices),
                 " into no rows");
  if (values != nullptr) {
    check_rows(op, "values", *values, first.dtype, indices.shape[0], k, first_name, first);
    check_contiguous(op, "values", *values);
  }
  return {pairs, k, indices.data, indices.dtype == DType::kInt64,
          values == nullptr ? nullptr : values->data};
}

// A block is at least one slice of a bag, or at least eight pairs.
int64_t most_blocks(int64_t rows, int64_t columns) {
  return rows * std::max<int64_t>(ceil_div(columns, 128), 1);
}

// Bags of one warp each would leave multiprocessors with fewer warps than hide memory's latency.
bool together(const CudaBags& bags, int multiprocessors) {
  const int64_t slice = 512 / size_of(bags.dtype);
  return bags.codes.k >= 16 &&
         bags.bags * ceil_div(bags.columns, slice) < int64_t{16} * multiprocessors;
}

void bind_decode(const TensorView& out, const TensorView& values, const TensorView& indices,
                 const TensorView& weight, const std::optional<TensorView>& bias) {
  constexpr const char* op = "topk_decode";
  check_first(op, "weight", weight);
  const int64_t width = weight.shape[0], columns = weight.shape[1];
  const CudaCodes codes = codes_of(op, indices, &values, width, "weight", weight);
  const int64_t tokens = indices.shape[0];
  check_out(op, out, weight.dtype, tokens, columns, "weight", weight);
  const void* biases = bias_of(op, bias, columns, weight.dtype, weight);
  check_grid(op, most_blocks(tokens, columns));
  const CudaModule& module = cuda_module(op, weight);
  CudaBags bags{weight.dtype, tokens, columns,           codes,  nullptr,  nullptr,
                weight.data,  width,  weight.strides[0], biases, out.data, false};
  bags.together = together(bags, module.device(weight.device_index).multiprocessors);
  module.topk->sum_bags(bags, stream_of(weight));
}

void bind_values(const TensorView& out, const TensorView& dy, const TensorView& indices,
                 const TensorView& weight) {
  constexpr const char* op = "topk_values";
  check_first(op, "weight", weight);
  const int64_t width = weight.shape[0], columns = weight.shape[1];
  const CudaCodes codes = codes_of(op, indices, nullptr, width, "weight", weight);
  const int64_t tokens = indices.shape[0];
  check_rows(op, "dy", dy, weight.dtype, tokens, columns, "weight", weight);
  check_out(op, out, weight.dtype, tokens, codes.k, "weight", weight);
  const CudaModule& module = cuda_module(op, weight);
  module.topk->dot_rows({weight.dtype, columns, codes, dy.data, dy.strides[0], weight.data, width,
                         weight.strides[0], out.data},
                        stream_of(weight));
}

// `order` has the numbers of the pairs, sorted by row and within a row as they were; those of row r
// begin at begins[r].
void bind_weight(const TensorView& out, const TensorView& values, const TensorView& indices,
                 const TensorView& dy, const TensorView& begins, const TensorView& order) {
  constexpr const char* op = "topk_weight";
  check_first(op, "dy", dy);
  check_matrix(op, "out", out);
  const int64_t width = out.shape[0], columns = dy.shape[1];
  check_out(op, out, dy.dtype, width, columns, "dy", dy);
  const CudaCodes codes = codes_of(op, indices, &values, width, "dy", dy);
  check_rows(op, "dy", dy, dy.dtype, indices.shape[0], columns, "dy", dy);
  for (const auto& [what, t, length] :
       {std::tuple{"begins", &begins, width + 1}, std::tuple{"order", &order, codes.pairs}}) {
    check_device(op, what, *t, "dy", dy);
    check_dtype(op, what, *t, DType::kInt64);
    check_vector(op, what, *t, length);
  }
  check_grid(op, most_blocks(width, columns));
  cuda_module(op, dy).topk->sum_bags(
      {dy.dtype, width, columns, codes, begins.as<const int64_t>(), order.as<const int64_t>(),
       dy.data, dy.shape[0], dy.strides[0], nullptr, out.data, false},
      stream_of(dy));
}

void bind_select(const TensorView& values, const TensorView& indices, const TensorView& dense,
                 bool relu) {
  constexpr const char* op = "topk_select";
  check_first(op, "dense", dense);
  check_contiguous(op, "dense", dense);
  const int64_t rows = dense.shape[0], width = dense.shape[1];
  check_matrix(op, "values", values);
  const int64_t k = values.shape[1], most = std::min(width, kMostSelected);
  GOSSAMER_CHECK(1 <= k && k <= most, op, ": k is ", k, ", a GPU's kernel selects 1 to ", most,
                 " of ", width);
  GOSSAMER_CHECK(width <= kMostCounted && rows <= kMostCounted, op, ": ", rows, " rows of ", width,
                 " columns, a GPU's kernel counts to 2**31 - 1");
  check_rows(op, "values", values, dense.dtype, rows, k, "dense", dense);
  check_contiguous(op, "values", values);
  check_rows(op, "indices", indices, DType::kInt64, rows, k, "dense", dense);
  check_contiguous(op, "indices", indices);
  const CudaModule& module = cuda_module(op, dense);
  const int64_t shared_bytes = choose_selection_shared_bytes(width * size_of(dense.dtype),
                                                             module.device(dense.device_index));
  module.topk->select({dense.dtype, rows, width, k, dense.data, relu, values.data,
                       indices.as<int64_t>(), shared_bytes},
                      stream_of(dense));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("topk_decode_cuda", &bind_decode, py::arg("out"), py::arg("values"), py::arg("indices"),
        py::arg("weight"), py::arg("bias"));
  m.def("topk_values_cuda", &bind_values, py::arg("out"), py::arg("dy"), py::arg("indices"),
        py::arg("weight"));
  m.attr("topk_most_selected") = kMostSelected;
  m.def("topk_select_cuda", &bind_select, py::arg("values"), py::arg("indices"), py::arg("dense"),
        py::arg("relu"));
  m.def("topk_weight_cuda", &bind_weight, py::arg("out"), py::arg("values"), py::arg("indices"),
        py::arg("dy"), py::arg("begins"), py::arg("order"));
}

}  // namespace gossamer::actsparse::topk
