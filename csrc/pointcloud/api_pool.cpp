// The border of pooling: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include "common/py_tensor.h"
#include "pointcloud/border_kernel_map.h"
#include "pointcloud/pool.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "pointcloud_pool";
using Order = std::optional<TensorView>;

PoolArgs checked(const TensorView& out, const TensorView& feats, const TensorView& in_index,
                 const TensorView& out_index, const TensorView& tap_offsets, const Order& in_order,
                 const Order& out_order, int threads) {
  check_on_cpu(kOp, "feats", feats);
  check_matrix(kOp, "feats", feats);
  check_weight_dtype(kOp, "feats", feats);
  check_on_cpu(kOp, "out", out);
  check_matrix(kOp, "out", out);
  check_dtype(kOp, "out", out, feats.dtype);
  check_shape(kOp, "out", out, out.shape[0], feats.shape[1]);
  check_contiguous(kOp, "out", out);
  const int64_t rows = feats.shape[0], channels = feats.shape[1];
  check_adjacent_columns(kOp, "feats", feats);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // winners are int32
  GOSSAMER_CHECK(rows <= kMost && out.shape[0] <= kMost, kOp, ": ", rows, " and ", out.shape[0],
                 " voxels, expected at most ", kMost);
  const int64_t taps = tap_offsets.numel() - 1;
  GOSSAMER_CHECK(taps >= 0, kOp, ": tap_offsets is empty, expected one more than the taps");
  const KernelMap map = checked_map(kOp, {in_index, out_index, tap_offsets, in_order, out_order},
                                    taps, rows, out.shape[0], Ascent::kWeak, threads);
  return {feats.dtype, map, channels, feats.data, feats.strides[0], out.data, threads};
}

int32_t* winners_of(const TensorView& winner, int64_t rows, int64_t channels) {
  check_on_cpu(kOp, "winner", winner);
  check_matrix(kOp, "winner", winner);
  check_dtype(kOp, "winner", winner, DType::kInt32);
  check_shape(kOp, "winner", winner, rows, channels);
  check_contiguous(kOp, "winner", winner);
  return winner.as<int32_t>();
}

}  // namespace

void bind_pool(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "pointcloud_sum_pool",
      [](const TensorView& out, const TensorView& feats, const TensorView& in_index,
         const TensorView& out_index, const TensorView& tap_offsets, const Order& in_order,
         const Order& out_order, bool mean, int threads) {
        sum_pool(
            checked(out, feats, in_index, out_index, tap_offsets, in_order, out_order, threads),
            mean);
      },
      py::arg("out"), py::arg("feats"), py::arg("in_index"), py::arg("out_index"),
      py::arg("tap_offsets"), py::arg("in_order"), py::arg("out_order"), py::arg("mean"),
      py::arg("threads"), release());
  m.def(
      "pointcloud_max_pool",
      [](const TensorView& out, const TensorView& winner, const TensorView& feats,
         const TensorView& in_index, const TensorView& out_index, const TensorView& tap_offsets,
         const Order& in_order, const Order& out_order, int threads) {
        max_pool(
            checked(out, feats, in_index, out_index, tap_offsets, in_order, out_order, threads),
            winners_of(winner, out.shape[0], out.shape[1]));
      },
      py::arg("out"), py::arg("winner"), py::arg("feats"), py::arg("in_index"),
      py::arg("out_index"), py::arg("tap_offsets"), py::arg("in_order"), py::arg("out_order"),
      py::arg("threads"), release());
  m.def(
      "pointcloud_max_pool_grad",
      [](const TensorView& out, const TensorView& feats, const TensorView& winner,
         const TensorView& in_index, const TensorView& out_index, const TensorView& tap_offsets,
         const Order& in_order, const Order& out_order, int threads) {
        max_pool_grad(
            checked(out, feats, in_index, out_index, tap_offsets, in_order, out_order, threads),
            winners_of(winner, feats.shape[0], feats.shape[1]));
      },
      py::arg("out"), py::arg("feats"), py::arg("winner"), py::arg("in_index"),
      py::arg("out_index"), py::arg("tap_offsets"), py::arg("in_order"), py::arg("out_order"),
      py::arg("threads"), release());
}

}  // namespace gossamer::pointcloud
