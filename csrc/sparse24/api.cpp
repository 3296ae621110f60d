// The border: what Python hands over is checked here, once; inside, pointers are trusted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "common/parallel.h"
#include "sparse24/checks.h"
#include "sparse24/gemm_config.h"
#include "sparse24/sparse24.h"

namespace py = pybind11;

namespace gossamer::sparse24 {
namespace {

bool is_weight_dtype(DType t) {
  return t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16 ||
         t == DType::kFloat64;
}

// The portable weight [n, k] behind (values, indices), both checked against it.
Weight portable(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                int64_t k) {
  check_matrix(op, "values", values);
  check_matrix(op, "indices", indices);
  if (!is_weight_dtype(values.dtype)) {
    throw py::type_error(std::string(op) + ": values are " + name(values.dtype) +
                         ", expected float32, bfloat16, float16 or float64");
  }
  check_dtype(op, "indices", indices, DType::kUInt8);
  check_size(op, n, k);
  Weight w{values.dtype, n, k, values.data, indices.as<const uint8_t>(), nullptr};
  check_shape(op, "values", values, n, 2 * w.groups());
  check_shape(op, "indices", indices, n, w.index_bytes());
  check_contiguous(op, "values", values);
  check_contiguous(op, "indices", indices);
  return w;
}

// The dense twin [n, k] of a portable weight.
Weight with_dense(const char* op, const TensorView& dense, const TensorView& values,
                  const TensorView& indices) {
  check_matrix(op, "dense", dense);
  check_contiguous(op, "dense", dense);
  check_dtype(op, "values", values, dense.dtype);
  return portable(op, values, indices, dense.shape[0], dense.shape[1]);
}

DType panel_dtype(const std::string& dtype) {
  const DType t = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(t) || t == DType::kFloat64) {
    throw py::type_error("Sparse24Panels: no panels for " + dtype +
                         "; float32, bfloat16 and float16 have them");
  }
  return t;
}

Weight panels(const char* op, const TensorView& t, DType dtype, int64_t n, int64_t k) {
  check_cpu(op, "panels", t);
  check_dtype(op, "panels", t, DType::kInt32);
  check_size(op, n, k);
  Weight w{dtype, n, k, nullptr, nullptr, t.as<const uint32_t>()};
  GOSSAMER_CHECK(t.ndim == 4 && t.shape[0] == w.blocks() && t.shape[1] == w.records() &&
                     t.shape[2] == 1 + w.value_words() && t.shape[3] == kBlockN,
                 op, ": panels have shape ", shape_text(t), ", expected [", w.blocks(), ", ",
                 w.records(), ", ", 1 + w.value_words(), ", ", kBlockN, "] for a ", name(dtype),
                 " weight [", n, ", ", k, "]");
  check_contiguous(op, "panels", t);
  return w;
}

void bind_from_dense(const TensorView& dense, const TensorView& values, const TensorView& indices,
                     int threads) {
  const Weight w = with_dense("sparse24_from_dense", dense, values, indices);
  from_dense(dense.data, w, values.data, indices.as<uint8_t>(), threads);
}

void bind_gather(const TensorView& dense, const TensorView& indices, const TensorView& values,
                 int threads) {
  const Weight w = with_dense("sparse24_gather", dense, values, indices);
  gather(dense.data, w, values.data, threads);
}

void bind_to_dense(const TensorView& values, const TensorView& indices, const TensorView& dense,
                   int threads) {
  to_dense(with_dense("sparse24_to_dense", dense, values, indices), dense.data, threads);
}

void bind_validate(const TensorView& values, const TensorView& indices, int64_t in_features,
                   int threads) {
  check_matrix("Sparse24", "values", values);
  validate(portable("Sparse24", values, indices, values.shape[0], in_features), threads);
}

std::vector<int64_t> panels_shape(int64_t out_features, int64_t in_features,
                                  const std::string& dtype) {
  const Weight w{panel_dtype(dtype), out_features, in_features, nullptr, nullptr, nullptr};
  return {w.blocks(), w.records(), 1 + w.value_words(), kBlockN};
}

void bind_to_panels(const TensorView& values, const TensorView& indices, int64_t in_features,
                    const TensorView& out, int threads) {
  constexpr const char* op = "sparse24_to_panels";
  check_matrix(op, "values", values);
  const Weight w = portable(op, values, indices, values.shape[0], in_features);
  panels(op, out, panel_dtype(name(w.dtype)), w.n, w.k);
  const int team = threads_for_bytes(threads, 4 * w.blocks() * w.block_words());
  parallel_ranges(team, w.blocks(), [&](int64_t begin, int64_t end) {
    to_panels(w, begin, end, out.as<uint32_t>() + begin * w.block_words());
  });
}

void bind_from_panels(const TensorView& in, const TensorView& values, const TensorView& indices,
                      int64_t in_features, int threads) {
  constexpr const char* op = "sparse24_from_panels";
  check_matrix(op, "values", values);
  const Weight shape = portable(op, values, indices, values.shape[0], in_features);
  const Weight w = panels(op, in, panel_dtype(name(shape.dtype)), shape.n, shape.k);
  const int team = threads_for_bytes(threads, 4 * w.blocks() * w.block_words());
  parallel_ranges(team, w.blocks(), [&](int64_t begin, int64_t end) {
    from_panels(w, begin, end, values.data, indices.as<uint8_t>());
  });
}

void bind_linear(const TensorView& out, const TensorView& x, const TensorView& weight,
                 const std::optional<TensorView>& indices, const std::optional<TensorView>& bias,
                 const std::string& activation, int threads) {
  constexpr const char* op = "sparse24_linear";
  check_matrix(op, "x", x);
  check_matrix(op, "out", out);
  if (!is_weight_dtype(x.dtype)) {
    throw py::type_error(std::string(op) + ": x is " + name(x.dtype) +
                         ", expected float32, bfloat16, float16 or float64");
  }
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  if (indices) check_dtype(op, "the weight", weight, x.dtype);
  const Weight w = indices ? portable(op, weight, *indices, n, k)
                           : panels(op, weight, panel_dtype(name(x.dtype)), n, k);
  check_dtype(op, "out", out, x.dtype);
  check_shape(op, "out", out, m, n);
  check_contiguous(op, "out", out);
  if (bias) {
    check_dtype(op, "bias", *bias, x.dtype);
    check_vector(op, "bias", *bias, n);
  }
  gemm({w, m, x.data, x.strides[0], x.strides[1], bias ? bias->data : nullptr,
        activation_of(op, activation), out.data, threads});
}

py::dict choose(int64_t m, int64_t n, int64_t k, const std::string& dtype, int threads) {
  GOSSAMER_CHECK(m >= 1 && m <= int64_t{1} << 40, "sparse24_choose: m is ", m,
                 ", expected 1 to 2**40");
  check_size("sparse24_choose", n, k);
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error("sparse24_choose: no kernels for " + dtype);
  const Target target = gossamer::target();
  const GemmConfig config = choose_gemm_config(m, n, k, type, target, threads);
  py::dict report;
  report["target"] = name(config.kernel == Kernel::kSerial ? Target::kSerial : target);
  report["threads"] = config.threads;
  report["tile"] = config.tile;
  switch (config.kernel) {
    case Kernel::kSerial:
      report["kernel"] = "serial";
      report["why"] = target == Target::kSerial ? "no vector target is in force"
                                                : "float64 has the serial kernel only";
      break;
    case Kernel::kFewRows:
      report["kernel"] = "few_rows";
      report["why"] = "up to " + std::to_string(traits(target).few_rows_limit) +
                      " rows: bound by reading the weights once";
      break;
    case Kernel::kManyRows:
      report["kernel"] = "many_rows";
      report["why"] =
          "above " + std::to_string(traits(target).few_rows_limit) + " rows: bound by arithmetic";
      break;
  }
  return report;
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("sparse24_from_dense", &bind_from_dense, py::arg("dense"), py::arg("values"),
        py::arg("indices"), py::arg("threads"), release());
  m.def("sparse24_gather", &bind_gather, py::arg("dense"), py::arg("indices"), py::arg("values"),
        py::arg("threads"), release());
  m.def("sparse24_to_dense", &bind_to_dense, py::arg("values"), py::arg("indices"),
        py::arg("dense"), py::arg("threads"), release());
  m.def("sparse24_validate", &bind_validate, py::arg("values"), py::arg("indices"),
        py::arg("in_features"), py::arg("threads"), release());
  m.def("sparse24_panels_shape", &panels_shape, py::arg("out_features"), py::arg("in_features"),
        py::arg("dtype"));
  m.def("sparse24_to_panels", &bind_to_panels, py::arg("values"), py::arg("indices"),
        py::arg("in_features"), py::arg("panels"), py::arg("threads"), release());
  m.def("sparse24_from_panels", &bind_from_panels, py::arg("panels"), py::arg("values"),
        py::arg("indices"), py::arg("in_features"), py::arg("threads"), release());
  m.def("sparse24_linear", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("indices"), py::arg("bias"), py::arg("activation"), py::arg("threads"), release());
  m.def("sparse24_choose", &choose, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("threads"));
}

}  // namespace gossamer::sparse24
