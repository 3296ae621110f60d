// The border of a GPU's maps. Orders, keys and sums of counts are not looked at, which
// would have to wait for the GPU: Python's pointcloud/native.py makes them.
#include <pybind11/stl.h>

#include "common/ceil_div.h"
#include "common/cuda_border.h"
#include "pointcloud/border_maps.h"
#include "pointcloud/cuda.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "pointcloud";

using Sizes = std::vector<std::vector<int64_t>>;

WindowKeys window_keys(const Sides& sides, const Sizes& sizes) {
  const auto columns = static_cast<int>(sides.first.size());
  GOSSAMER_CHECK(columns >= 2 && columns <= kMostColumns, kOp, ": a box of ", columns,
                 " columns, expected 2 to 5");
  const Box box = box_of(kOp, sides, columns);
  const Window window = window_of(kOp, sizes, columns - 1);
  const Box reach = with_reach(box, window);
  const KeySpace space(reach);
  WindowKeys keys{};
  keys.columns = columns;
  keys.lines = 1, keys.line_taps = window.kernel[columns - 2];
  keys.dilation = window.dilation[columns - 2];
  for (int c = 0; c < columns; ++c) {
    keys.step[c] = space.step(c), keys.low[c] = reach.low[c];
    keys.least[c] = reach.low[c], keys.most[c] = box.high[c];
    keys.stride[c] = c == 0 ? 1 : window.stride[c - 1];
    keys.padding[c] = c == 0 ? 0 : window.padding[c - 1];
  }
  for (int axis = 0; axis + 1 < columns; ++axis) {
    keys.kernel[axis] = window.kernel[axis];
    keys.tap_step[axis] = static_cast<uint64_t>(window.dilation[axis]) * space.step(axis + 1);
    if (axis + 2 < columns) keys.lines *= window.kernel[axis];
  }
  return keys;
}

void check_on(const char* what, const TensorView& t, DType dtype, const TensorView& first) {
  check_device(kOp, what, t, "walkers", first);
  check_dtype(kOp, what, t, dtype);
  check_contiguous(kOp, what, t);
}

NumberedRows numbered(const char* what, const TensorView& coords,
                      const std::optional<TensorView>& order, const TensorView& keys, int columns,
                      const TensorView& first) {
  check_on(what, coords, DType::kInt32, first);
  check_matrix(kOp, what, coords);
  const int64_t count = coords.shape[0];
  check_shape(kOp, what, coords, count, columns);
  GOSSAMER_CHECK(count <= INT32_MAX, kOp, ": ", count, " voxels, at most ", INT32_MAX);
  check_on("keys", keys, DType::kInt64, first);
  check_vector(kOp, "keys", keys, count);
  if (order) {
    check_on("order", *order, DType::kInt32, first);
    check_vector(kOp, "order", *order, count);
  }
  return {coords.as<const int32_t>(), order ? order->as<const int32_t>() : nullptr, count,
          keys.as<uint64_t>()};
}

// What counting and writing have in common.
CudaSearchArgs search_of(const WindowKeys& window, const TensorView& walker_keys,
                         const TensorView& target_keys) {
  const int64_t walkers = walker_keys.shape[0];
  const int64_t warps = ceil_div(walkers, kSearchWalkers) * window.lines;
  GOSSAMER_CHECK(warps <= INT32_MAX, kOp, ": ", walkers, " voxels and ", window.lines,
                 " lines of taps, a GPU searches 2**31 - 1 times 32 of them");
  CudaSearchArgs args{};
  args.window = window;
  args.walkers = walkers, args.targets = target_keys.shape[0];
  args.walker_keys = walker_keys.as<const uint64_t>();
  args.target_keys = target_keys.as<const uint64_t>();
  return args;
}

void count_pairs(const TensorView& counts, const TensorView& walker_keys,
                 const TensorView& target_keys, const TensorView& walkers,
                 const std::optional<TensorView>& walker_order, const TensorView& targets,
                 const std::optional<TensorView>& target_order, const Sides& target_box,
                 const Sizes& sizes) {
  const WindowKeys window = window_keys(target_box, sizes);
  const NumberedRows from =
      numbered("walkers", walkers, walker_order, walker_keys, window.columns, walkers);
  const NumberedRows to =
      numbered("targets", targets, target_order, target_keys, window.columns, walkers);
  CudaSearchArgs args = search_of(window, walker_keys, target_keys);
  check_on("counts", counts, DType::kInt32, walkers);
  check_vector(kOp, "counts", counts,
               window.lines * window.line_taps * ceil_div(from.count, kSearchWalkers));
  args.counts = counts.as<int32_t>();
  const CudaKernels& kernels = *cuda_module(kOp, walkers).pointcloud;
  kernels.number(window, from, true, stream_of(walkers));
  kernels.number(window, to, false, stream_of(walkers));
  kernels.search(args, stream_of(walkers));
}

void write_pairs(const TensorView& walker_ranks, const TensorView& target_ranks,
                 const TensorView& ends, const TensorView& walker_keys,
                 const TensorView& target_keys, const Sides& target_box, const Sizes& sizes) {
  const WindowKeys window = window_keys(target_box, sizes);
  for (const auto& [what, keys] :
       {std::pair{"walker_keys", &walker_keys}, {"target_keys", &target_keys}}) {
    check_on(what, *keys, DType::kInt64, walker_ranks);
    GOSSAMER_CHECK(keys->ndim == 1, kOp, ": ", what, " has ", keys->ndim,
                   " dimensions, expected 1");
  }
  CudaSearchArgs args = search_of(window, walker_keys, target_keys);
  check_on("ends", ends, DType::kInt64, walker_ranks);
  check_vector(kOp, "ends", ends,
               window.lines * window.line_taps * ceil_div(args.walkers, kSearchWalkers));
  check_dtype(kOp, "walker_ranks", walker_ranks, DType::kInt32);
  check_vector(kOp, "walker_ranks", walker_ranks, walker_ranks.numel());
  check_on("target_ranks", target_ranks, DType::kInt32, walker_ranks);
  check_vector(kOp, "target_ranks", target_ranks, walker_ranks.numel());
  args.ends = ends.as<const int64_t>(), args.pairs = walker_ranks.numel();
  if (args.pairs == 0) return;
  args.walker_ranks = walker_ranks.as<int32_t>(), args.target_ranks = target_ranks.as<int32_t>();
  cuda_module(kOp, walker_ranks).pointcloud->search(args, stream_of(walker_ranks));
}

// ---- the outputs of a layer ---------------------------------------------------------------------

using Shape = std::optional<std::vector<int64_t>>;

Box outputs_of(const Sides& sides, const Sizes& sizes, const std::string& rule,
               const Shape& shape) {
  const auto columns = static_cast<int>(sides.first.size());
  GOSSAMER_CHECK(columns >= 2 && columns <= kMostColumns, kOp, ": a box of ", columns,
                 " columns, expected 2 to 5");
  GOSSAMER_CHECK(!shape || std::cmp_equal(shape->size() + 1, columns), kOp, ": a shape of ",
                 shape ? shape->size() : 0, " axes for coordinates of ", columns, " columns");
  return outputs_box(box_of(kOp, sides, columns), window_of(kOp, sizes, columns - 1),
                     rule_of(kOp, rule), shape ? shape->data() : nullptr);
}

uint64_t count_cells(const Sides& sides, const Sizes& sizes, const std::string& rule,
                     const Shape& shape) {
  const Box box = outputs_of(sides, sizes, rule, shape);
  return box.empty() ? 0 : KeySpace(box).cells();
}

// found: a byte a cell, zeroed, or an int64 for each tap and input.
void bind_outputs(const TensorView& found, const TensorView& coords, const Sides& sides,
                  const Sizes& sizes, const std::string& text, const Shape& shape) {
  const Box box = outputs_of(sides, sizes, text, shape);
  const Rule rule = rule_of(kOp, text);
  const Window window = window_of(kOp, sizes, box.columns - 1);
  check_matrix(kOp, "coords", coords);
  check_dtype(kOp, "coords", coords, DType::kInt32);
  check_shape(kOp, "coords", coords, coords.shape[0], box.columns);
  check_contiguous(kOp, "coords", coords);
  GOSSAMER_CHECK(coords.shape[0] <= INT32_MAX, kOp, ": ", coords.shape[0], " voxels, at most ",
                 INT32_MAX);
  GOSSAMER_CHECK(!box.empty(), kOp, ": there are no outputs to find");
  const KeySpace space(box);
  CudaOutputsArgs args{};
  args.columns = box.columns, args.inputs = coords.shape[0], args.taps = 1;
  args.coords = coords.as<const int32_t>();
  args.divides = rule != Rule::kSpread, args.exact = rule == Rule::kReached;
  for (int c = 0; c < box.columns; ++c) {
    args.low[c] = box.low[c], args.high[c] = box.high[c], args.step[c] = space.step(c);
  }
  for (int a = 0; a + 1 < box.columns; ++a) {
    const bool floored = rule == Rule::kFloored;
    args.kernel[a] = floored ? 1 : window.kernel[a];
    args.padding[a] = floored ? 0 : window.padding[a];
    args.stride[a] = window.stride[a], args.dilation[a] = window.dilation[a];
    args.by_kernel[a] = Divisor(args.kernel[a]), args.by_stride[a] = Divisor(args.stride[a]);
    args.taps *= args.kernel[a];
  }
  check_device(kOp, "found", found, "coords", coords);
  if (found.dtype == DType::kUInt8) {
    GOSSAMER_CHECK(std::cmp_equal(found.numel(), space.cells()), kOp, ": found has ", found.numel(),
                   " marks for ", space.cells(), " cells");
    check_vector(kOp, "found", found, found.numel());
    args.marks = found.as<uint8_t>();
  } else {
    check_dtype(kOp, "found", found, DType::kInt64);
    check_vector(kOp, "found", found, args.taps * args.inputs);
    args.keys = found.as<uint64_t>();
  }
  cuda_module(kOp, coords).pointcloud->outputs(args, stream_of(coords));
}

// Where the keys that were found lie.
void bind_cells(const TensorView& coords, const TensorView& keys, const Sides& sides,
                const Sizes& sizes, const std::string& rule, const Shape& shape) {
  const Box box = outputs_of(sides, sizes, rule, shape);
  const KeySpace space(box);
  check_matrix(kOp, "coords", coords);
  check_dtype(kOp, "coords", coords, DType::kInt32);
  check_shape(kOp, "coords", coords, coords.shape[0], box.columns);
  check_contiguous(kOp, "coords", coords);
  check_device(kOp, "keys", keys, "coords", coords);
  check_dtype(kOp, "keys", keys, DType::kInt64);
  check_vector(kOp, "keys", keys, coords.shape[0]);
  GOSSAMER_CHECK(coords.shape[0] <= INT32_MAX, kOp, ": ", coords.shape[0], " voxels, at most ",
                 INT32_MAX);
  GOSSAMER_CHECK(space.cells() < uint64_t{1} << 63, kOp, ": ", space.cells(),
                 " cells, expected fewer than 2**63");
  CudaCells args{};
  args.columns = box.columns, args.count = coords.shape[0];
  args.keys = keys.as<const uint64_t>(), args.coords = coords.as<int32_t>();
  for (int c = 0; c < box.columns; ++c) {
    args.low[c] = box.low[c], args.step[c] = space.step(c), args.by_step[c] = Divisor(args.step[c]);
  }
  cuda_module(kOp, coords).pointcloud->cells(args, stream_of(coords));
}

}  // namespace

void bind_maps_cuda(py::module_& m) {
  m.attr("pointcloud_search_walkers") = kSearchWalkers;
  m.def("pointcloud_count_pairs_cuda", &count_pairs, py::arg("counts"), py::arg("walker_keys"),
        py::arg("target_keys"), py::arg("walkers"), py::arg("walker_order"), py::arg("targets"),
        py::arg("target_order"), py::arg("target_box"), py::arg("window"));
  m.def("pointcloud_write_pairs_cuda", &write_pairs, py::arg("walker_ranks"),
        py::arg("target_ranks"), py::arg("ends"), py::arg("walker_keys"), py::arg("target_keys"),
        py::arg("target_box"), py::arg("window"));
  m.def("pointcloud_count_cells", &count_cells, py::arg("box"), py::arg("window"), py::arg("rule"),
        py::arg("shape"));
  m.def("pointcloud_find_outputs_cuda", &bind_outputs, py::arg("found"), py::arg("coords"),
        py::arg("box"), py::arg("window"), py::arg("rule"), py::arg("shape"));
  m.def("pointcloud_cells_cuda", &bind_cells, py::arg("coords"), py::arg("keys"), py::arg("box"),
        py::arg("window"), py::arg("rule"), py::arg("shape"));
}

}  // namespace gossamer::pointcloud
