// The border of the convolutions over point clouds: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/border.h"
#include "common/parallel.h"
#include "common/py_tensor.h"
#include "pointcloud/pointcloud.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

// The tensors of a kernel map, as they come from Python.
struct MapViews {
  const TensorView &in, &out, &tap_offsets;
  const std::optional<TensorView>&in_order, &out_order;
};

// One pass over `count` ranks, of which the sign of `wrong(i)` tells: arithmetic that the compiler
// makes vectors of. Returns the first wrong one's index, or -1; a second pass looks for it.
template <class Wrong>
int64_t first_wrong(int64_t begin, int64_t end, const Wrong& wrong) {
  uint32_t signs = 0;
  for (int64_t i = begin; i < end; ++i) signs |= wrong(i);
  for (int64_t i = begin; signs >> 31 != 0 && i < end; ++i) {
    if (wrong(i) >> 31 != 0) return i;
  }
  return -1;
}

void check_ranks(const char* op, const char* what, const TensorView& ranks, int64_t count,
                 int threads) {
  const auto* rank = ranks.as<const uint32_t>();
  const int64_t n = ranks.numel(), most = std::numeric_limits<int32_t>::max();
  const auto last = static_cast<uint32_t>(std::min(count - 1, most));
  std::atomic<int64_t> found{-1};
  parallel_ranges(threads_for_bytes(threads, 4 * n), n, [&](int64_t begin, int64_t end) {
    const int64_t at =
        first_wrong(begin, end, [&](int64_t i) { return rank[i] | (last - rank[i]); });
    if (at >= 0) found.store(at);
  });
  const int64_t at = found.load();
  if (at >= 0) {
    fail(op, ": ", what, "[", at, "] is ", static_cast<int32_t>(rank[at]), ", there are ", count,
         " rows");
  }
}

// Pairs of a tap whose ranks do not ascend would be passed over, or be counted for a wrong output.
void check_ascending(const char* op, const char* what, const TensorView& ranks,
                     const int64_t* tap_offsets, int64_t taps, int threads) {
  const auto* rank = ranks.as<const uint32_t>();
  std::atomic<int64_t> found{-1};
  const int64_t n = ranks.numel();
  parallel_ranges(threads_for_bytes(threads, 4 * n), n, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t first = std::max(begin, tap_offsets[t] + 1);
      const int64_t at = first_wrong(first, std::min(end, tap_offsets[t + 1]),
                                     [&](int64_t i) { return rank[i] - rank[i - 1] - 1; });
      if (at >= 0) found.store(at);
    }
  });
  const int64_t at = found.load();
  if (at >= 0) {
    fail(op, ": ", what, "[", at, "] is ", rank[at], ", not above ", rank[at - 1],
         ", the one before it in its tap");
  }
}

void check_order(const char* op, const char* what, const std::optional<TensorView>& order,
                 int64_t count, int threads) {
  if (!order) return;
  check_dtype(op, what, *order, DType::kInt32);
  check_vector(op, what, *order, count);
  check_ranks(op, what, *order, count, threads);
}

KernelMap checked_map(const char* op, const MapViews& views, int64_t taps, int64_t n_in,
                      int64_t n_out, int threads) {
  const auto& [in, out, tap_offsets, in_order, out_order] = views;
  check_dtype(op, "tap_offsets", tap_offsets, DType::kInt64);
  check_vector(op, "tap_offsets", tap_offsets, taps + 1);
  check_dtype(op, "in_index", in, DType::kInt32);
  check_dtype(op, "out_index", out, DType::kInt32);
  const auto* offsets = tap_offsets.as<const int64_t>();
  GOSSAMER_CHECK(offsets[0] == 0, op, ": tap_offsets[0] is ", offsets[0], ", expected 0");
  for (int64_t t = 0; t < taps; ++t) {
    GOSSAMER_CHECK(offsets[t + 1] >= offsets[t], op, ": tap_offsets[", t + 1, "] is ",
                   offsets[t + 1], ", below the one before it, ", offsets[t]);
  }
  check_vector(op, "in_index", in, offsets[taps]);
  check_vector(op, "out_index", out, offsets[taps]);
  check_ranks(op, "in_index", in, n_in, threads);
  check_ranks(op, "out_index", out, n_out, threads);
  check_ascending(op, "in_index", in, offsets, taps, threads);
  check_ascending(op, "out_index", out, offsets, taps, threads);
  check_order(op, "in_order", in_order, n_in, threads);
  check_order(op, "out_order", out_order, n_out, threads);
  const auto* in_rows = in_order ? in_order->as<const int32_t>() : nullptr;
  const auto* out_rows = out_order ? out_order->as<const int32_t>() : nullptr;
  return {taps,    n_in,    n_out, offsets, in.as<const int32_t>(), out.as<const int32_t>(),
          in_rows, out_rows};
}

// A matrix with a row a voxel, of any distance between rows.
void check_rows(const char* op, const char* what, const TensorView& t, DType dtype) {
  check_matrix(op, what, t);
  check_dtype(op, what, t, dtype);
  GOSSAMER_CHECK(t.device == Device::kCPU, op, ": ", what, " is on ", device_text(t),
                 ", this is the CPU's product");
  GOSSAMER_CHECK(t.strides[1] == 1 || t.shape[1] == 1 || t.shape[0] == 0, op, ": ", what,
                 " has strides [", t.strides[0], ", ", t.strides[1],
                 "], its columns must be contiguous");
}

Channels checked_channels(const char* op, const TensorView& weights, int64_t c_in, int64_t groups,
                          DType dtype) {
  GOSSAMER_CHECK(weights.ndim == 3, op, ": weight has ", weights.ndim,
                 " dimensions, expected 3: [taps, C_in / groups, C_out]");
  check_dtype(op, "weight", weights, dtype);
  check_contiguous(op, "weight", weights);
  const int64_t c_out = weights.shape[2];
  GOSSAMER_CHECK(weights.shape[0] >= 1 && weights.shape[1] >= 1 && c_out >= 1, op,
                 ": weight has shape ", shape_text(weights), ", expected at least [1, 1, 1]");
  GOSSAMER_CHECK(groups >= 1 && c_in == groups * weights.shape[1] && c_out % groups == 0, op,
                 ": weight of shape ", shape_text(weights), " and ", groups,
                 " groups do not fit features of ", c_in, " channels");
  return {groups, c_in, c_out};
}

void bind_forward(const TensorView& y, const TensorView& x, const TensorView& weights,
                  const std::optional<TensorView>& bias, const TensorView& in,
                  const TensorView& out, const TensorView& tap_offsets,
                  const std::optional<TensorView>& in_order,
                  const std::optional<TensorView>& out_order, int64_t groups,
                  const std::string& activation, int threads) {
  constexpr const char* op = "pointcloud_conv";
  check_weight_dtype(op, "feats", x);
  check_rows(op, "feats", x, x.dtype);
  check_rows(op, "out", y, x.dtype);
  const Channels channels = checked_channels(op, weights, x.shape[1], groups, x.dtype);
  check_shape(op, "out", y, y.shape[0], channels.out);
  check_contiguous(op, "out", y);
  const void* biases = bias_of(op, bias, channels.out, x.dtype, x);
  const KernelMap map = checked_map(op, {in, out, tap_offsets, in_order, out_order},
                                    weights.shape[0], x.shape[0], y.shape[0], threads);
  conv({x.dtype, map, channels, x.data, x.strides[0], weights.data, biases,
        activation_of(op, activation), y.data, threads});
}

void bind_weight_grad(const TensorView& dw, const TensorView& dy, const TensorView& x,
                      const TensorView& in, const TensorView& out, const TensorView& tap_offsets,
                      const std::optional<TensorView>& in_order,
                      const std::optional<TensorView>& out_order, int64_t groups, int threads) {
  constexpr const char* op = "pointcloud_conv_weight_grad";
  check_weight_dtype(op, "feats", x);
  check_rows(op, "feats", x, x.dtype);
  check_rows(op, "dy", dy, x.dtype);
  const Channels channels = checked_channels(op, dw, x.shape[1], groups, x.dtype);
  check_shape(op, "dy", dy, dy.shape[0], channels.out);
  const KernelMap map = checked_map(op, {in, out, tap_offsets, in_order, out_order}, dw.shape[0],
                                    x.shape[0], dy.shape[0], threads);
  weight_grad(
      {x.dtype, map, channels, dy.data, x.data, dy.strides[0], x.strides[0], dw.data, threads});
}

}  // namespace

void bind_conv(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pointcloud_conv", &bind_forward, py::arg("out"), py::arg("feats"), py::arg("weight"),
        py::arg("bias"), py::arg("in_index"), py::arg("out_index"), py::arg("tap_offsets"),
        py::arg("in_order"), py::arg("out_order"), py::arg("groups"), py::arg("activation"),
        py::arg("threads"), release());
  m.def("pointcloud_conv_weight_grad", &bind_weight_grad, py::arg("out"), py::arg("dy"),
        py::arg("feats"), py::arg("in_index"), py::arg("out_index"), py::arg("tap_offsets"),
        py::arg("in_order"), py::arg("out_order"), py::arg("groups"), py::arg("threads"),
        release());
  m.def(
      "pointcloud_conv_choose",
      [](const std::string& dtype, int64_t c_in, int64_t c_out, int64_t groups) {
        const DType type = dlpack::dtype_from_name(dtype);
        if (!is_weight_dtype(type)) {
          throw py::type_error("pointcloud_conv_choose: no kernels for " + dtype);
        }
        const ConvChoice choice = choose_conv(type, {groups, c_in, c_out});
        py::dict report;
        report["target"] = choice.target;
        report["kernel"] = choice.kernel;
        report["why"] = choice.why;
        return report;
      },
      py::arg("dtype"), py::arg("c_in"), py::arg("c_out"), py::arg("groups") = 1);
}

}  // namespace gossamer::pointcloud
