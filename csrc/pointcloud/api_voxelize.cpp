// The border of voxelize: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "pointcloud/border_maps.h"
#include "pointcloud/border_points.h"
#include "pointcloud/voxelize.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "voxelize";

void bind_quantize(const TensorView& points, const std::optional<TensorView>& batch,
                   const std::vector<double>& size, const TensorView& coords, int threads) {
  check_coords(kOp, "coords", coords);
  Points of = points_of(kOp, points, size, coords);
  if (batch) {
    check_vector(kOp, "batch", *batch, points.shape[0]);
    check_ints(kOp, "batch", *batch, DType::kInt32);
    of.batch = batch->as<int32_t>();
  }
  quantize(of, coords.as<int32_t>(), threads);
}

void write_voxels(const Voxels& voxels, const TensorView& coords, const TensorView& voxel_of,
                  const TensorView& begins) {
  check_coords(kOp, "voxels", coords);
  check_shape(kOp, "voxels", coords, voxels.count(), voxels.rows().columns);
  check_vector(kOp, "voxel_of", voxel_of, voxels.rows().count);
  check_vector(kOp, "begins", begins, voxels.count() + 1);
  check_ints(kOp, "voxel_of", voxel_of, DType::kInt64);
  check_ints(kOp, "begins", begins, DType::kInt64);
  voxels.write(coords.as<int32_t>(), voxel_of.as<int64_t>(), begins.as<int64_t>());
}

Reduce reduce_of(const std::string& text) {
  if (text == "mean") return Reduce::kMean;
  if (text == "first") return Reduce::kFirst;
  if (text == "max") return Reduce::kMax;
  fail(kOp, ": reduce '", text, "' is unknown; mean, first or max");
}

void bind_reduce(const TensorView& feats, const std::optional<TensorView>& order,
                 const TensorView& begins, const std::string& how, const TensorView& out,
                 int threads) {
  check_matrix(kOp, "features", feats);
  check_weight_dtype(kOp, "features", feats);
  check_contiguous(kOp, "features", feats);
  check_matrix(kOp, "out", out);
  check_shape(kOp, "out", out, out.shape[0], feats.shape[1]);
  check_dtype(kOp, "out", out, feats.dtype);
  check_contiguous(kOp, "out", out);
  check_device(kOp, "features", feats, "out", out);
  check_vector(kOp, "begins", begins, out.shape[0] + 1);
  check_ints(kOp, "begins", begins, DType::kInt64);
  if (order) {
    check_vector(kOp, "order", *order, feats.shape[0]);
    check_ints(kOp, "order", *order, DType::kInt32);
  }
  reduce({feats.dtype, feats.data, order ? order->as<int32_t>() : nullptr, begins.as<int64_t>(),
          feats.shape[0], out.shape[0], feats.shape[1], reduce_of(how), out.data, threads});
}

}  // namespace

void bind_voxelize(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pointcloud_quantize", &bind_quantize, py::arg("points"), py::arg("batch"), py::arg("size"),
        py::arg("coords"), py::arg("threads"), release());
  // The rows are read again by write().
  py::class_<Voxels>(m, "PointcloudVoxels")
      .def(py::init(
               [](const TensorView& coords, const std::optional<TensorView>& order, int threads) {
                 return Voxels(rows_of(kOp, "coords", coords, order), threads);
               }),
           py::arg("coords"), py::arg("order"), py::arg("threads"), py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>(), release())
      .def("__len__", &Voxels::count)
      .def("write", &write_voxels, py::arg("coords"), py::arg("voxel_of"), py::arg("begins"),
           release());
  m.def("pointcloud_reduce", &bind_reduce, py::arg("feats"), py::arg("order"), py::arg("begins"),
        py::arg("reduce"), py::arg("out"), py::arg("threads"), release());
}

}  // namespace gossamer::pointcloud
