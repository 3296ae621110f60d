// The border of what a GPU's convolutions read of a map. The numbers in its tensors are not looked
// at, which would have to wait for the GPU: the kernels stay within their memory whatever they are.
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "common/ceil_div.h"
#include "common/cuda_border.h"
#include "common/py_tensor.h"
#include "pointcloud/border_cuda.h"
#include "pointcloud/cuda.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "pointcloud";
constexpr int64_t kMostTaps = 65535;  // the extent of a grid

using Order = std::optional<TensorView>;
// in_index, out_index, tap_offsets on the CPU, in_order, out_order
using Map = std::tuple<TensorView, TensorView, TensorView, Order, Order>;

const int32_t* order_of(const char* what, const Order& order, int64_t rows,
                        const TensorView& first) {
  if (!order) return nullptr;
  return check_vector_on(kOp, what, *order, DType::kInt32, rows, first, "in_index")
      .as<const int32_t>();
}

CudaPairs pairs_of(const Map& map, const TensorView& offsets, int64_t n_in, int64_t n_out) {
  const auto& [in, out, tap_offsets, in_order, out_order] = map;
  CudaPairs pairs{};
  pairs.n_in = n_in, pairs.n_out = n_out;
  pairs.in = check_vector_on(kOp, "in_index", in, DType::kInt32, kAnyLength, in, "in_index")
                 .as<const int32_t>();
  pairs.pairs = in.shape[0];
  pairs.out = check_vector_on(kOp, "out_index", out, DType::kInt32, pairs.pairs, in, "in_index")
                  .as<const int32_t>();
  check_dtype(kOp, "tap_offsets", tap_offsets, DType::kInt64);
  check_vector(kOp, "tap_offsets", tap_offsets, tap_offsets.numel());
  pairs.taps = tap_offsets.numel() - 1;
  GOSSAMER_CHECK(tap_offsets.device == Device::kCPU && pairs.taps >= 1 && pairs.taps <= kMostTaps,
                 kOp, ": tap_offsets of ", pairs.taps, " taps on ", device_text(tap_offsets),
                 ", expected 1 to ", kMostTaps, " on the CPU");
  const auto* ends = tap_offsets.as<const int64_t>();
  for (int64_t t = 0; t < pairs.taps; ++t) {
    pairs.most = std::max(pairs.most, std::min(ends[t + 1] - ends[t], pairs.pairs));
  }
  GOSSAMER_CHECK(n_in >= 0 && n_in <= INT32_MAX && n_out >= 0 && n_out <= INT32_MAX, kOp, ": ",
                 n_in, " and ", n_out, " voxels, a GPU's kernels count to 2**31 - 1");
  pairs.tap_offsets =
      check_vector_on(kOp, "offsets", offsets, DType::kInt64, pairs.taps + 1, in, "in_index")
          .as<const int64_t>();
  pairs.in_order = order_of("in_order", in_order, n_in, in);
  pairs.out_order = order_of("out_order", out_order, n_out, in);
  return pairs;
}

void bind_masks(const TensorView& masks, const Map& map, const TensorView& offsets, int64_t n_in,
                int64_t n_out) {
  const CudaPairs pairs = pairs_of(map, offsets, n_in, n_out);
  const TensorView& first = std::get<0>(map);
  const bool wide = masks.dtype != DType::kInt32;
  check_vector_on(kOp, "masks", masks, wide ? DType::kInt64 : DType::kInt32, n_out, first,
                  "in_index");
  cuda_module(kOp, first).pointcloud->mask_taps(pairs, masks.data, wide, stream_of(first));
}

CudaGroups groups_of(const CudaPairs& pairs, const TensorView& order, const TensorView& places,
                     const TensorView& bits, const TensorView& first) {
  CudaGroups groups{};
  groups.groups = ceil_div(pairs.n_out, kGroupRows);
  groups.order = check_vector_on(kOp, "order", order, DType::kInt64, pairs.n_out, first, "in_index")
                     .as<const int64_t>();
  groups.places =
      check_vector_on(kOp, "places", places, DType::kInt32, pairs.n_out, first, "in_index")
          .as<int32_t>();
  groups.bits = check_vector_on(kOp, "bits", bits, DType::kInt32, groups.groups * (pairs.taps + 1),
                                first, "in_index")
                    .as<int32_t>();
  return groups;
}

void bind_groups(const TensorView& places, const TensorView& bits, const TensorView& order,
                 const Map& map, const TensorView& offsets, int64_t n_in, int64_t n_out) {
  const TensorView& first = std::get<0>(map);
  const CudaPairs pairs = pairs_of(map, offsets, n_in, n_out);
  const CudaGroups groups = groups_of(pairs, order, places, bits, first);
  cuda_module(kOp, first).pointcloud->group_outputs(pairs, groups, stream_of(first));
}

void bind_table(const TensorView& neighbours, const TensorView& rows, const TensorView& begins,
                const TensorView& visited, const TensorView& heavy, const TensorView& places,
                const TensorView& bits, const TensorView& order, const Map& map,
                const TensorView& offsets, int64_t n_in, int64_t n_out) {
  const TensorView& first = std::get<0>(map);
  const CudaPairs pairs = pairs_of(map, offsets, n_in, n_out);
  const CudaGroups groups = groups_of(pairs, order, places, bits, first);
  const int64_t positions = groups.groups * kGroupRows;
  const auto vector = [&](const char* what, const TensorView& t, DType dtype, int64_t length) {
    check_vector_on(kOp, what, t, dtype, length, first, "in_index");
  };
  vector("rows", rows, DType::kInt32, positions);
  vector("begins", begins, DType::kInt32, groups.groups + 1);
  vector("visited", visited, DType::kInt32, kAnyLength);
  vector("heavy", heavy, DType::kInt64, groups.groups);
  check_matrix(kOp, "neighbours", neighbours);
  check_device(kOp, "neighbours", neighbours, "in_index", first);
  check_dtype(kOp, "neighbours", neighbours, DType::kInt32);
  check_shape(kOp, "neighbours", neighbours, pairs.taps, positions);
  check_contiguous(kOp, "neighbours", neighbours);
  const CudaTable table{heavy.as<const int64_t>(), visited.shape[0],   begins.as<const int32_t>(),
                        neighbours.as<int32_t>(),  rows.as<int32_t>(), visited.as<int32_t>()};
  cuda_module(kOp, first).pointcloud->fill_table(pairs, groups, table, stream_of(first));
}

void bind_rows(const TensorView& in_rows, const TensorView& out_rows, const Map& map,
               const TensorView& offsets, int64_t n_in, int64_t n_out) {
  const TensorView& first = std::get<0>(map);
  const CudaPairs pairs = pairs_of(map, offsets, n_in, n_out);
  for (const auto& [what, rows] : {std::pair{"in_rows", &in_rows}, {"out_rows", &out_rows}}) {
    check_vector_on(kOp, what, *rows, DType::kInt32, pairs.pairs, first, "in_index");
  }
  cuda_module(kOp, first)
      .pointcloud->rows_of_pairs(pairs, in_rows.as<int32_t>(), out_rows.as<int32_t>(),
                                 stream_of(first));
}

}  // namespace

void bind_layout_cuda(py::module_& m) {
  m.def("pointcloud_mask_taps_cuda", &bind_masks, py::arg("masks"), py::arg("map"),
        py::arg("offsets"), py::arg("n_in"), py::arg("n_out"));
  m.def("pointcloud_group_outputs_cuda", &bind_groups, py::arg("places"), py::arg("bits"),
        py::arg("order"), py::arg("map"), py::arg("offsets"), py::arg("n_in"), py::arg("n_out"));
  m.def("pointcloud_fill_table_cuda", &bind_table, py::arg("neighbours"), py::arg("rows"),
        py::arg("begins"), py::arg("visited"), py::arg("heavy"), py::arg("places"), py::arg("bits"),
        py::arg("order"), py::arg("map"), py::arg("offsets"), py::arg("n_in"), py::arg("n_out"));
  m.def("pointcloud_pair_rows_cuda", &bind_rows, py::arg("in_rows"), py::arg("out_rows"),
        py::arg("map"), py::arg("offsets"), py::arg("n_in"), py::arg("n_out"));
}

}  // namespace gossamer::pointcloud
