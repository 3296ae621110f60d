// The border of a GPU's pooling. The numbers in lists are not looked at, which would have to wait
// for the GPU: the kernels stay within their memory whatever they are.
#include <pybind11/stl.h>

#include "common/ceil_div.h"
#include "common/cuda_border.h"
#include "common/py_tensor.h"
#include "pointcloud/border_cuda.h"
#include "pointcloud/border_rows.h"
#include "pointcloud/cuda.h"

namespace py = pybind11;

namespace gossamer::pointcloud {
namespace {

constexpr const char* kOp = "pointcloud_pool";
constexpr int64_t kMostSplits = 65535, kMostChannels = 1 << 24;  // the extents of a grid
using Order = std::optional<TensorView>;

void check_rows_of(const char* what, int64_t rows) {
  GOSSAMER_CHECK(rows <= INT32_MAX, kOp, ": ", rows, " ", what, ", at most ", INT32_MAX);
}

const int32_t* order_of(const char* what, const Order& order, int64_t rows,
                        const TensorView& first) {
  if (!order) return nullptr;
  return check_vector_on(kOp, what, *order, DType::kInt32, rows, first).as<const int32_t>();
}

void bind_list(const TensorView& rows, const TensorView& begins, const TensorView& ranks,
               const Order& places, const TensorView& in_index, const Order& in_order,
               int64_t n_in) {
  CudaListing listing{};
  listing.n_in = n_in, listing.n_out = begins.numel() - 1, listing.pairs = in_index.numel();
  check_rows_of("inputs", n_in);
  check_rows_of("outputs", listing.n_out);
  const auto vector = [&](const char* what, const TensorView& t, DType dtype, int64_t length) {
    check_vector_on(kOp, what, t, dtype, length, in_index, "in_index");
  };
  vector("in_index", in_index, DType::kInt32, listing.pairs);
  vector("rows", rows, DType::kInt32, listing.pairs);
  vector("ranks", ranks, DType::kInt32, listing.pairs);
  vector("begins", begins, DType::kInt64, kAnyLength);
  GOSSAMER_CHECK(listing.n_out >= 0, kOp, ": begins is empty, expected one more than the outputs");
  if (places) vector("places", *places, DType::kInt64, listing.pairs);
  listing.places = places ? places->as<const int64_t>() : nullptr;
  listing.in_order = order_of("in_order", in_order, n_in, in_index);
  listing.ranks = ranks.as<const int32_t>(), listing.in = in_index.as<const int32_t>();
  listing.rows = rows.as<int32_t>(), listing.begins = begins.as<int64_t>();
  cuda_module(kOp, in_index).pointcloud->list_pairs(listing, stream_of(in_index));
}

CudaPool pool_of(const std::string& reduce) {
  if (reduce == "sum") return CudaPool::kSum;
  if (reduce == "mean") return CudaPool::kMean;
  if (reduce == "max") return CudaPool::kMax;
  if (reduce == "winners") return CudaPool::kToWinner;
  fail(kOp, ": reduce '", reduce, "'; sum, mean, max or winners");
}

void bind_pool(const TensorView& out, const TensorView& feats, const Order& winner,
               const TensorView& rows, const TensorView& begins, const Order& out_order,
               const std::string& reduce, int64_t splits, const Order& partial, const Order& took) {
  check_weight_dtype(kOp, "feats", feats);
  check_rows(kOp, "feats", feats, feats.dtype);
  check_rows_of("inputs", feats.shape[0]);
  check_matrix(kOp, "out", out);
  check_device(kOp, "out", out, "feats", feats);
  check_dtype(kOp, "out", out, feats.dtype);
  check_shape(kOp, "out", out, out.shape[0], feats.shape[1]);
  check_contiguous(kOp, "out", out);
  check_rows_of("outputs", out.shape[0]);
  CudaPoolArgs args{};
  args.dtype = feats.dtype, args.pool = pool_of(reduce), args.channels = feats.shape[1];
  GOSSAMER_CHECK(args.channels <= kMostChannels && splits >= 1 && splits <= kMostSplits, kOp, ": ",
                 args.channels, " channels in ", splits, " parts, at most ", kMostChannels, " in ",
                 kMostSplits);
  args.feats = feats.data, args.feats_stride = feats.strides[0], args.out = out.data;
  args.lists = {
      feats.shape[0],
      out.shape[0],
      rows.numel(),
      check_vector_on(kOp, "rows", rows, DType::kInt32, kAnyLength, feats).as<const int32_t>(),
      check_vector_on(kOp, "begins", begins, DType::kInt64, out.shape[0] + 1, feats)
          .as<const int64_t>(),
      order_of("out_order", out_order, out.shape[0], feats)};
  const bool maximum = args.pool == CudaPool::kMax;
  if (maximum || args.pool == CudaPool::kToWinner) {
    GOSSAMER_CHECK(winner, kOp, ": ", reduce, " needs the winners");
    check_matrix(kOp, "winner", *winner);
    check_device(kOp, "winner", *winner, "feats", feats);
    check_dtype(kOp, "winner", *winner, DType::kInt32);
    check_shape(kOp, "winner", *winner, maximum ? out.shape[0] : feats.shape[0], args.channels);
    check_contiguous(kOp, "winner", *winner);
    args.winner = winner->as<int32_t>();
  }
  args.splits = splits;
  const int64_t kept = splits * out.numel();
  if (splits > 1) {
    GOSSAMER_CHECK(partial && (took || !maximum), kOp, ": ", splits, " parts need their results");
    args.partial =
        check_vector_on(kOp, "partial", *partial, DType::kFloat64, kept, feats).as<double>();
    if (maximum) {
      args.took = check_vector_on(kOp, "took", *took, DType::kInt32, kept, feats).as<int32_t>();
    }
  }
  cuda_module(kOp, feats).pointcloud->pool(args, stream_of(feats));
}

}  // namespace

void bind_pool_cuda(py::module_& m) {
  m.def("pointcloud_list_pairs_cuda", &bind_list, py::arg("rows"), py::arg("begins"),
        py::arg("ranks"), py::arg("places"), py::arg("in_index"), py::arg("in_order"),
        py::arg("n_in"));
  m.def("pointcloud_pool_cuda", &bind_pool, py::arg("out"), py::arg("feats"), py::arg("winner"),
        py::arg("rows"), py::arg("begins"), py::arg("out_order"), py::arg("reduce"),
        py::arg("splits"), py::arg("partial"), py::arg("took"));
}

}  // namespace gossamer::pointcloud
