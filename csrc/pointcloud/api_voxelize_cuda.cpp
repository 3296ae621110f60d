// The border of a GPU's voxels and of its sort of coordinates.
#include <pybind11/stl.h>

#include "common/cuda_border.h"
#include "pointcloud/border_cuda.h"
#include "pointcloud/border_maps.h"
#include "pointcloud/border_points.h"
#include "pointcloud/cuda.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

void check_cells(const char* op, const char* what, const TensorView& cells,
                 const TensorView& first) {
  check_matrix(op, what, cells);
  check_device(op, what, cells, "the first operand", first);
  check_dtype(op, what, cells, DType::kInt32);
  check_contiguous(op, what, cells);
  GOSSAMER_CHECK(
      cells.shape[1] >= 2 && cells.shape[1] <= kMostColumns && cells.shape[0] <= INT32_MAX, op,
      ": ", what, " have shape ", shape_text(cells), ", expected up to 2**31 - 1 rows of 2 to 5");
}

void bind_quantize(const TensorView& cells, const TensorView& refused, const TensorView& points,
                   const std::optional<TensorView>& batch, const std::vector<double>& size) {
  constexpr const char* op = "voxelize";
  check_cells(op, "cells", cells, points);
  Points of = points_of(op, points, size, cells);
  if (batch) {
    of.batch = check_vector_on(op, "batch", *batch, DType::kInt32, of.count, points, "points")
                   .as<const int32_t>();
  }
  check_vector_on(op, "refused", refused, DType::kInt64, 1, points, "points");
  cuda_module(op, points)
      .pointcloud->quantize(of, cells.as<int32_t>(), refused.as<int64_t>(), stream_of(points));
}

void bind_keys(const TensorView& keys, const TensorView& coords, const Sides& sides) {
  constexpr const char* op = "pointcloud";
  check_cells(op, "coords", coords, coords);
  CudaCellKeys args{};
  args.columns = static_cast<int>(coords.shape[1]), args.count = coords.shape[0];
  const Box box = box_of(op, sides, args.columns);
  const KeySpace space(box);
  for (int c = 0; c < args.columns; ++c) args.low[c] = box.low[c], args.step[c] = space.step(c);
  args.coords = coords.as<const int32_t>();
  args.keys =
      check_vector_on(op, "keys", keys, DType::kInt64, args.count, coords, "coords").as<int64_t>();
  cuda_module(op, coords).pointcloud->cell_keys(args, stream_of(coords));
}

void bind_inspect(const TensorView& rows, const TensorView& found, const TensorView& keys,
                  const TensorView& order) {
  constexpr const char* op = "pointcloud";
  const auto vector = [&](const char* what, const TensorView& t, DType dtype, int64_t length) {
    return check_vector_on(op, what, t, dtype, length, keys, "keys").data;
  };
  CudaOrder args{};
  args.count = keys.numel();
  args.keys = static_cast<const int64_t*>(vector("keys", keys, DType::kInt64, args.count));
  args.order = static_cast<const int64_t*>(vector("order", order, DType::kInt64, args.count));
  args.rows = static_cast<int32_t*>(vector("rows", rows, DType::kInt32, args.count));
  args.found = static_cast<int64_t*>(vector("found", found, DType::kInt64, 3));
  cuda_module(op, keys).pointcloud->inspect(args, stream_of(keys));
}

void bind_voxels(const TensorView& coords, const TensorView& of_point, const TensorView& rows,
                 const TensorView& begins, const TensorView& cells, const TensorView& order,
                 const TensorView& voxels_to) {
  constexpr const char* op = "voxelize";
  check_cells(op, "cells", cells, cells);
  check_cells(op, "coords", coords, cells);
  check_shape(op, "coords", coords, coords.shape[0], cells.shape[1]);
  const auto vector = [&](const char* what, const TensorView& t, DType dtype, int64_t length) {
    return check_vector_on(op, what, t, dtype, length, cells, "cells").data;
  };
  CudaVoxels args{};
  args.columns = static_cast<int>(cells.shape[1]);
  args.points = cells.shape[0], args.voxels = coords.shape[0];
  args.cells = cells.as<const int32_t>(), args.coords = coords.as<int32_t>();
  args.order = static_cast<const int64_t*>(vector("order", order, DType::kInt64, args.points));
  args.voxels_to =
      static_cast<const int64_t*>(vector("voxels_to", voxels_to, DType::kInt64, args.points));
  args.of_point = static_cast<int64_t*>(vector("of_point", of_point, DType::kInt64, args.points));
  args.rows = static_cast<int32_t*>(vector("rows", rows, DType::kInt32, args.points));
  args.begins = static_cast<int64_t*>(vector("begins", begins, DType::kInt64, args.voxels + 1));
  cuda_module(op, cells).pointcloud->voxels(args, stream_of(cells));
}

}  // namespace

void bind_voxelize_cuda(py::module_& m) {
  m.def("pointcloud_quantize_cuda", &bind_quantize, py::arg("cells"), py::arg("refused"),
        py::arg("points"), py::arg("batch"), py::arg("size"));
  m.def("pointcloud_keys_cuda", &bind_keys, py::arg("keys"), py::arg("coords"), py::arg("box"));
  m.def("pointcloud_inspect_cuda", &bind_inspect, py::arg("rows"), py::arg("found"),
        py::arg("keys"), py::arg("order"));
  m.def("pointcloud_voxels_cuda", &bind_voxels, py::arg("coords"), py::arg("of_point"),
        py::arg("rows"), py::arg("begins"), py::arg("cells"), py::arg("order"),
        py::arg("voxels_to"));
}

}  // namespace gossamer::pointcloud
