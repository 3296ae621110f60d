// The border of the layouts and of the CPU's product: what Python hands over is checked here, once.
#include "sparse24/api.h"

#include <pybind11/stl.h>

#include "common/parallel.h"
#include "common/py_tensor.h"
#include "sparse24/gemm_config.h"

namespace py = pybind11;

namespace gossamer::sparse24 {

bool is_quantized_dtype(DType t) {
  return t == DType::kInt8 || t == DType::kE4M3 || t == DType::kUInt8;
}

void check_size(const char* op, int64_t n, int64_t k) {
  GOSSAMER_CHECK(n >= 1 && k >= 1, op, ": the weight is [", n, ", ", k,
                 "], expected at least [1, 1]");
}

// What a kernel reads of values of any type.
Weight stored_weight(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                     int64_t k) {
  check_matrix(op, "values", values);
  check_matrix(op, "indices", indices);
  check_dtype(op, "indices", indices, DType::kUInt8);
  check_device(op, "indices", indices, "values", values);
  check_size(op, n, k);
  Weight w{values.dtype, n, k, values.data, indices.as<const uint8_t>(), nullptr};
  check_shape(op, "values", values, n, w.value_columns());
  check_shape(op, "indices", indices, n, w.index_bytes());
  check_contiguous(op, "values", values);
  check_contiguous(op, "indices", indices);
  return w;
}

Weight portable(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                int64_t k) {
  check_weight_dtype(op, "values", values);
  return stored_weight(op, values, indices, n, k);
}

DType panel_dtype(const std::string& dtype, bool or_quantized) {
  const DType t = dlpack::dtype_from_name(dtype);
  if (t == DType::kFloat64 || !(is_weight_dtype(t) || (or_quantized && is_quantized_dtype(t)))) {
    throw py::type_error("Sparse24Panels: no panels for " + dtype +
                         "; float32, bfloat16 and float16 have them, and the values of "
                         "Sparse24Quantized");
  }
  return t;
}

std::vector<int64_t> panels_shape(bool gpu, int64_t n, int64_t k, DType dtype) {
  const Weight w{dtype, n, k, nullptr, nullptr, nullptr};
  if (gpu && dtype != DType::kFloat32) {
    return {(n + kFragmentRows - 1) / kFragmentRows, (k + kFragmentColumns - 1) / kFragmentColumns,
            fragment_words(dtype)};
  }
  return {w.blocks(), w.records(), 1 + w.value_words(), kBlockN};
}

Weight panels(const char* op, const TensorView& t, DType dtype, int64_t n, int64_t k) {
  check_dtype(op, "panels", t, DType::kInt32);
  check_size(op, n, k);
  TensorView expected;
  for (int64_t size : panels_shape(on_gpu(t), n, k, dtype)) expected.shape[expected.ndim++] = size;
  GOSSAMER_CHECK(shape_text(t) == shape_text(expected), op, ": panels have shape ", shape_text(t),
                 ", expected ", shape_text(expected), " for a ", name(dtype), " weight [", n, ", ",
                 k, "] on ", device_text(t));
  check_contiguous(op, "panels", t);
  // A GPU faults on a wide load from anywhere else, after which the process cannot use it any more.
  GOSSAMER_CHECK(!on_gpu(t) || reinterpret_cast<uintptr_t>(t.data) % 16 == 0, op,
                 ": panels begin at ", t.data, ", which is no multiple of 16 bytes");
  return {dtype, n, k, nullptr, nullptr, t.as<const uint32_t>()};
}

namespace {

// The dense twin [n, k] of a portable weight.
Weight with_dense(const char* op, const TensorView& dense, const TensorView& values,
                  const TensorView& indices) {
  check_matrix(op, "dense", dense);
  check_contiguous(op, "dense", dense);
  check_dtype(op, "values", values, dense.dtype);
  check_device(op, "values", values, "dense", dense);
  return portable(op, values, indices, dense.shape[0], dense.shape[1]);
}

// Of the dtype, device and shape of another, and contiguous.
void check_like(const char* op, const char* what, const TensorView& t, const TensorView& other) {
  check_dtype(op, what, t, other.dtype);
  check_device(op, what, t, "the other", other);
  GOSSAMER_CHECK(shape_text(t) == shape_text(other), op, ": ", what, " has shape ", shape_text(t),
                 ", the other ", shape_text(other));
  check_contiguous(op, what, t);
}

// Two numbers in the GPU's memory, in which a kernel reports what it found wrong.
int64_t* status_of(const char* op, const std::optional<TensorView>& status, const TensorView& t) {
  GOSSAMER_CHECK(status, op, ": a CUDA tensor needs a status");
  check_dtype(op, "status", *status, DType::kInt64);
  check_device(op, "status", *status, "the weight", t);
  GOSSAMER_CHECK(status->numel() == 2 && status->is_contiguous(), op, ": status has shape ",
                 shape_text(*status), ", expected [2]");
  return status->as<int64_t>();
}

void bind_from_dense(const TensorView& dense, const TensorView& values, const TensorView& indices,
                     int threads, const std::optional<TensorView>& status) {
  constexpr const char* op = "sparse24_from_dense";
  const Weight w = with_dense(op, dense, values, indices);
  if (!on_gpu(dense)) {
    return from_dense(dense.data, w, values.data, indices.as<uint8_t>(), threads);
  }
  const Misfits found =
      cuda_kernels(op, dense).from_dense(dense.data, w, values.data, indices.as<uint8_t>(),
                                         status_of(op, status, dense), stream_of(dense));
  if (found.count > 0) fail_not_24(w, found.count, found.first);
}

void bind_project(const TensorView& weight, bool soft, double scale, const TensorView& dense,
                  const TensorView& values, const TensorView& indices, int threads) {
  constexpr const char* op = "sparse24_project";
  const Weight w = with_dense(op, dense, values, indices);
  check_on_cpu(op, "the weight", dense);
  check_like(op, "weight", weight, dense);
  project(weight.data, w, soft, scale, dense.data, values.data, indices.as<uint8_t>(), threads);
}

void bind_add_dropped(const TensorView& gradient, const TensorView& weight, const TensorView& kept,
                      double factor, int threads) {
  constexpr const char* op = "sparse24_add_dropped";
  check_weight_dtype(op, "weight", weight);
  check_contiguous(op, "weight", weight);
  check_on_cpu(op, "weight", weight);
  check_like(op, "kept", kept, weight);
  check_like(op, "gradient", gradient, weight);
  add_dropped(weight.data, kept.data, weight.numel(), weight.dtype, factor, gradient.data, threads);
}

void bind_gather(const TensorView& dense, const TensorView& indices, const TensorView& values,
                 int threads) {
  constexpr const char* op = "sparse24_gather";
  const Weight w = with_dense(op, dense, values, indices);
  if (!on_gpu(dense)) return gather(dense.data, w, values.data, threads);
  cuda_kernels(op, dense).gather(dense.data, w, values.data, stream_of(dense));
}

void bind_to_dense(const TensorView& values, const TensorView& indices, const TensorView& dense,
                   int threads) {
  constexpr const char* op = "sparse24_to_dense";
  const Weight w = with_dense(op, dense, values, indices);
  if (!on_gpu(dense)) return to_dense(w, dense.data, threads);
  cuda_kernels(op, dense).to_dense(w, dense.data, stream_of(dense));
}

void bind_validate(const TensorView& values, const TensorView& indices, int64_t in_features,
                   int threads, const std::optional<TensorView>& status) {
  constexpr const char* op = "Sparse24";
  check_matrix(op, "values", values);
  const Weight w = portable(op, values, indices, values.shape[0], in_features);
  if (!on_gpu(values)) return validate(w, threads);
  const Misfits found =
      cuda_kernels(op, values).validate(w, status_of(op, status, values), stream_of(values));
  if (found.count > 0) fail_indices(w, found.first, found.byte);
}

void bind_to_panels(const TensorView& values, const TensorView& indices, int64_t in_features,
                    const TensorView& out, int threads) {
  constexpr const char* op = "sparse24_to_panels";
  check_matrix(op, "values", values);
  check_device(op, "panels", out, "values", values);
  const DType dtype = panel_dtype(name(values.dtype), true);
  const Weight w = stored_weight(op, values, indices, values.shape[0], in_features);
  panels(op, out, dtype, w.n, w.k);
  if (on_gpu(values)) {
    return cuda_kernels(op, values).to_panels(w, out.as<uint32_t>(), stream_of(values));
  }
  const int team = threads_for_bytes(threads, 4 * w.blocks() * w.block_words());
  parallel_ranges(team, w.blocks(), [&](int64_t begin, int64_t end) {
    to_panels(w, begin, end, out.as<uint32_t>() + begin * w.block_words());
  });
}

void bind_from_panels(const TensorView& in, const TensorView& values, const TensorView& indices,
                      int64_t in_features, int threads) {
  constexpr const char* op = "sparse24_from_panels";
  check_matrix(op, "values", values);
  check_device(op, "values", values, "panels", in);
  const DType dtype = panel_dtype(name(values.dtype), true);
  const Weight shape = stored_weight(op, values, indices, values.shape[0], in_features);
  const Weight w = panels(op, in, dtype, shape.n, shape.k);
  if (on_gpu(in)) {
    return cuda_kernels(op, in).from_panels(w, values.data, indices.as<uint8_t>(), stream_of(in));
  }
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
  check_weight_dtype(op, "x", x);
  check_on_cpu(op, "x", x);
  check_device(op, "out", out, "x", x);
  check_device(op, "the weight", weight, "x", x);
  const int64_t m = x.shape[0], k = x.shape[1], n = out.shape[1];
  check_adjacent_columns(op, "x", x);
  if (indices) check_dtype(op, "the weight", weight, x.dtype);
  const Weight w = indices ? portable(op, weight, *indices, n, k)
                           : panels(op, weight, panel_dtype(name(x.dtype)), n, k);
  check_dtype(op, "out", out, x.dtype);
  check_shape(op, "out", out, m, n);
  check_contiguous(op, "out", out);
  gemm({w, m, x.data, x.strides[0], bias_of(op, bias, n, x.dtype, x), activation_of(op, activation),
        out.data, threads});
}

py::dict choose(int64_t m, int64_t n, int64_t k, const std::string& dtype, int threads,
                std::optional<bool> intel) {
  GOSSAMER_CHECK(m >= 1 && m <= int64_t{1} << 40, "sparse24_choose: m is ", m,
                 ", expected 1 to 2**40");
  check_size("sparse24_choose", n, k);
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error("sparse24_choose: no kernels for " + dtype);
  const Target target = gossamer::target();
  const bool on_intel = intel.value_or(intel_cores());
  const GemmConfig config = choose_gemm_config(m, n, k, type, target, on_intel, threads);
  const std::string limit = std::to_string(few_rows_limit(target, type, on_intel));
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
      report["why"] = "up to " + limit + " rows: bound by reading the weights once";
      break;
    case Kernel::kManyRows:
      report["kernel"] = by_tiles(target, type) ? "tiles" : "many_rows";
      report["why"] = "above " + limit + " rows: bound by arithmetic";
      break;
  }
  return report;
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("sparse24_from_dense", &bind_from_dense, py::arg("dense"), py::arg("values"),
        py::arg("indices"), py::arg("threads"), py::arg("status") = py::none(), release());
  m.def("sparse24_gather", &bind_gather, py::arg("dense"), py::arg("indices"), py::arg("values"),
        py::arg("threads"), release());
  m.def("sparse24_project", &bind_project, py::arg("weight"), py::arg("soft"), py::arg("scale"),
        py::arg("dense"), py::arg("values"), py::arg("indices"), py::arg("threads"), release());
  m.def("sparse24_add_dropped", &bind_add_dropped, py::arg("gradient"), py::arg("weight"),
        py::arg("kept"), py::arg("factor"), py::arg("threads"), release());
  m.def("sparse24_to_dense", &bind_to_dense, py::arg("values"), py::arg("indices"),
        py::arg("dense"), py::arg("threads"), release());
  m.def("sparse24_validate", &bind_validate, py::arg("values"), py::arg("indices"),
        py::arg("in_features"), py::arg("threads"), py::arg("status") = py::none(), release());
  m.def(
      "sparse24_panels_shape",
      [](int64_t n, int64_t k, const std::string& dtype, bool cuda) {
        return panels_shape(cuda, n, k, panel_dtype(dtype, true));
      },
      py::arg("out_features"), py::arg("in_features"), py::arg("dtype"), py::arg("cuda") = false);
  m.def("sparse24_to_panels", &bind_to_panels, py::arg("values"), py::arg("indices"),
        py::arg("in_features"), py::arg("panels"), py::arg("threads"), release());
  m.def("sparse24_from_panels", &bind_from_panels, py::arg("panels"), py::arg("values"),
        py::arg("indices"), py::arg("in_features"), py::arg("threads"), release());
  m.def("sparse24_linear", &bind_linear, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("indices"), py::arg("bias"), py::arg("activation"), py::arg("threads"), release());
  m.def("sparse24_choose", &choose, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
        py::arg("threads"), py::arg("intel") = py::none());
  bind_cuda(m);
}

}  // namespace gossamer::sparse24
