// The border of coordinate sets and kernel maps: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "pointcloud/border_maps.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "pointcloud";

py::tuple bind_bounds(const TensorView& coords, int threads) {
  check_coords(kOp, "coords", coords);
  const auto columns = static_cast<int>(coords.shape[1]);
  Box box;
  {
    const py::gil_scoped_release release;
    box = bounds(coords.as<int32_t>(), coords.shape[0], columns, threads);
  }
  py::tuple low(columns), high(columns);
  for (int c = 0; c < columns; ++c) low[c] = box.low[c], high[c] = box.high[c];
  return py::make_tuple(low, high);
}

std::tuple<bool, int64_t, int64_t> bind_sort(const TensorView& coords, const Sides& box,
                                             const TensorView& order, int threads) {
  const Rows rows = rows_of(kOp, "coords", coords, order);
  const SortReport report =
      sort(rows.coords, rows.count, box_of(kOp, box, rows.columns), order.as<int32_t>(), threads);
  return {report.ascending, report.repeated, report.first_repeated};
}

Pairs make_pairs(const TensorView& walkers, const std::optional<TensorView>& walker_order,
                 const TensorView& targets, const std::optional<TensorView>& target_order,
                 const Sides& target_box, const std::vector<std::vector<int64_t>>& window,
                 int threads) {
  const Rows from = rows_of(kOp, "walkers", walkers, walker_order);
  const Rows to = rows_of(kOp, "targets", targets, target_order);
  GOSSAMER_CHECK(from.columns == to.columns, kOp, ": coordinates of ", from.columns, " and of ",
                 to.columns, " columns");
  const Window w = window_of(kOp, window, to.columns - 1);
  bool mirrored = from.coords == to.coords && from.order == to.order && from.count == to.count;
  for (int a = 0; a + 1 < to.columns; ++a) {
    mirrored = mirrored && w.stride[a] == 1 && w.kernel[a] % 2 == 1 &&
               w.padding[a] == w.kernel[a] / 2 * w.dilation[a];
  }
  return Pairs(from, to, box_of(kOp, target_box, to.columns), w, mirrored, threads);
}

void write_pairs(const Pairs& pairs, const TensorView& walker_ranks, const TensorView& target_ranks,
                 const TensorView& tap_offsets, int threads) {
  const std::vector<int64_t>& offsets = pairs.tap_offsets();
  check_vector(kOp, "walker_ranks", walker_ranks, offsets.back());
  check_vector(kOp, "target_ranks", target_ranks, offsets.back());
  check_vector(kOp, "tap_offsets", tap_offsets, static_cast<int64_t>(offsets.size()));
  check_ints(kOp, "walker_ranks", walker_ranks, DType::kInt32);
  check_ints(kOp, "target_ranks", target_ranks, DType::kInt32);
  check_ints(kOp, "tap_offsets", tap_offsets, DType::kInt64);
  std::copy(offsets.begin(), offsets.end(), tap_offsets.as<int64_t>());
  pairs.write(walker_ranks.as<int32_t>(), target_ranks.as<int32_t>(), threads);
}

Outputs make_outputs(const TensorView& inputs, const std::optional<TensorView>& order,
                     const Sides& box, const std::vector<std::vector<int64_t>>& window,
                     const std::string& rule, const std::optional<std::vector<int64_t>>& shape,
                     int threads) {
  const Rows rows = rows_of(kOp, "inputs", inputs, order);
  GOSSAMER_CHECK(!shape || std::cmp_equal(shape->size() + 1, rows.columns), kOp, ": a shape of ",
                 shape ? shape->size() : 0, " axes for coordinates of ", rows.columns, " columns");
  return Outputs(rows, box_of(kOp, box, rows.columns), window_of(kOp, window, rows.columns - 1),
                 rule_of(kOp, rule), shape ? shape->data() : nullptr, threads);
}

void write_outputs(const Outputs& outputs, const TensorView& coords) {
  check_coords(kOp, "outputs", coords);
  check_shape(kOp, "outputs", coords, outputs.count(), outputs.columns());
  outputs.write(coords.as<int32_t>());
}

}  // namespace

void bind_maps(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pointcloud_bounds", &bind_bounds, py::arg("coords"), py::arg("threads"));
  m.def("pointcloud_sort", &bind_sort, py::arg("coords"), py::arg("box"), py::arg("order"),
        py::arg("threads"), release());
  py::class_<Pairs>(m, "PointcloudPairs")
      .def(py::init(&make_pairs), py::arg("walkers"), py::arg("walker_order"), py::arg("targets"),
           py::arg("target_order"), py::arg("target_box"), py::arg("window"), py::arg("threads"),
           release())
      .def("__len__", [](const Pairs& pairs) { return pairs.tap_offsets().back(); })
      .def("write", &write_pairs, py::arg("walker_ranks"), py::arg("target_ranks"),
           py::arg("tap_offsets"), py::arg("threads"), release());
  py::class_<Outputs>(m, "PointcloudOutputs")
      .def(py::init(&make_outputs), py::arg("inputs"), py::arg("order"), py::arg("box"),
           py::arg("window"), py::arg("rule"), py::arg("shape"), py::arg("threads"), release())
      .def("__len__", &Outputs::count)
      .def("write", &write_outputs, py::arg("coords"), release());
}

}  // namespace gossamer::pointcloud
