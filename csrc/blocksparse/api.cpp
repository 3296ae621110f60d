// The border: what Python hands over is checked here, the indices at every call.
#include "blocksparse/api.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_config.h"
#include "blocksparse/conv_tiles.h"
#include "blocksparse/conv_tiles_config.h"
#include "blocksparse/conv_unit.h"
#include "common/cache_size.h"
#include "common/conv_border.h"
#include "common/py_tensor.h"
#include "common/target.h"

namespace py = pybind11;

namespace gossamer::blocksparse {
namespace {

// What a weight of these sizes is, without its blocks.
Weight empty_weight(const char* op, DType dtype, int64_t out_channels, int64_t taps,
                    int64_t group_in, int64_t groups, int64_t rows, int64_t cols) {
  check_size(op, "the number of output channels", out_channels, 1);
  check_size(op, "the number of taps", taps, 1);
  check_size(op, "the number of input channels", group_in, 1);
  check_size(op, "the number of groups", groups, 1);
  GOSSAMER_CHECK(out_channels % groups == 0, op, ": ", out_channels, " output channels in ", groups,
                 " groups");
  GOSSAMER_CHECK(rows >= 1 && rows <= kMaxBlock && cols >= 1 && cols <= kMaxBlock, op,
                 ": blocks of ", rows, " x ", cols, ", expected 1 to ", kMaxBlock);
  const Weight w{dtype,   groups, out_channels / groups, taps, group_in, rows, cols, 0, nullptr,
                 nullptr, nullptr};
  check_size(op, "the number of block columns", w.block_columns(), 1);
  // Further than any memory reaches, and still an offset.
  GOSSAMER_CHECK(out_channels <= (int64_t{1} << 60) / (taps * group_in), op, ": a weight of ",
                 out_channels, " x ", taps, " x ", group_in, " is too large");
  return w;
}

// The same with blocks; packed where a block's columns are given. On a CPU their indices are
// checked; a GPU's would have to be waited for, and its kernels stay within the weight whatever
// they say.
Weight weight_of(const char* op, const TensorView& values, const TensorView& crow,
                 const TensorView& col, int64_t out_channels, int64_t taps, int64_t group_in,
                 int64_t groups, int64_t packed_cols = 0) {
  const bool packed = packed_cols != 0;
  const char* what = packed ? "panels" : "values";
  check_weight_dtype(op, what, values);
  check_dims(op, what, values, packed ? 4 : 3);
  check_dims(op, "crow_indices", crow, 1);
  check_dims(op, "col_indices", col, 1);
  check_dtype(op, "crow_indices", crow, DType::kInt32);
  check_dtype(op, "col_indices", col, DType::kInt32);
  check_device(op, "crow_indices", crow, what, values);
  check_device(op, "col_indices", col, what, values);
  const int64_t rows = values.shape[packed ? 2 : 1];
  const int64_t cols = packed ? packed_cols : values.shape[2];
  Weight w = empty_weight(op, values.dtype, out_channels, taps, group_in, groups, rows, cols);
  if (packed) {
    const int64_t per_word = 4 / size_of(values.dtype);
    GOSSAMER_CHECK(
        per_word > 0 && values.shape[1] == ceil_div(cols, per_word) && values.shape[3] == per_word,
        op, ": panels of shape ", shape_text(values), " for blocks of ", cols, " columns of ",
        name(values.dtype));
  }
  check_vector(op, "crow_indices", crow, w.block_rows() + 1);
  check_vector(op, "col_indices", col, values.shape[0]);
  w.nnz = values.shape[0];
  w.crow_indices = crow.as<const int32_t>();
  w.col_indices = col.as<const int32_t>();
  w.values = values.data;
  w.packed = packed;
  if (!on_gpu(values)) check_indices(w);
  return w;
}

void bind_find_live(const TensorView& dense, const TensorView& live, int64_t rows, int64_t cols,
                    int64_t groups, int threads) {
  constexpr const char* op = "blocksparse_find_live";
  check_weight_dtype(op, "dense", dense);
  check_dims(op, "dense", dense, 3);
  check_dims(op, "live", live, 2);
  check_dtype(op, "live", live, DType::kUInt8);
  const Weight w = empty_weight(op, dense.dtype, dense.shape[0], dense.shape[1], dense.shape[2],
                                groups, rows, cols);
  check_shape(op, "live", live, w.block_rows(), w.block_columns());
  check_device(op, "live", live, "dense", dense);
  if (on_gpu(dense)) {
    return cuda_kernels(op, dense).find_live(dense.data, w, live.as<uint8_t>(), stream_of(dense));
  }
  find_live(dense.data, w, live.as<uint8_t>(), threads);
}

// The weight whose dense form is [C_out, taps, C_in / groups].
Weight with_dense(const char* op, const TensorView& dense, const TensorView& values,
                  const TensorView& crow, const TensorView& col, int64_t groups) {
  check_dims(op, "dense", dense, 3);
  check_dtype(op, "values", values, dense.dtype);
  check_device(op, "values", values, "dense", dense);
  return weight_of(op, values, crow, col, dense.shape[0], dense.shape[1], dense.shape[2], groups);
}

void bind_gather(const TensorView& dense, const TensorView& crow, const TensorView& col,
                 const TensorView& values, int64_t groups, int threads) {
  constexpr const char* op = "blocksparse_gather";
  const Weight w = with_dense(op, dense, values, crow, col, groups);
  if (on_gpu(dense)) {
    return cuda_kernels(op, dense).gather(dense.data, w, values.data, stream_of(dense));
  }
  gather(dense.data, w, values.data, threads);
}

void bind_to_dense(const TensorView& values, const TensorView& crow, const TensorView& col,
                   const TensorView& dense, int64_t groups, int threads) {
  constexpr const char* op = "blocksparse_to_dense";
  const Weight w = with_dense(op, dense, values, crow, col, groups);
  if (on_gpu(dense)) {
    return cuda_kernels(op, dense).to_dense(w, dense.data, stream_of(dense));
  }
  to_dense(w, dense.data, threads);
}

void bind_validate(const TensorView& values, const TensorView& crow, const TensorView& col,
                   int64_t out_channels, int64_t taps, int64_t group_in, int64_t groups) {
  constexpr const char* op = "BlockSparse";
  const Weight w = weight_of(op, values, crow, col, out_channels, taps, group_in, groups);
  on_gpu(values) ? validate_cuda(op, w, values) : check_padding(w);
}

void bind_conv(const TensorView& out, const TensorView& x, const TensorView& values,
               const TensorView& crow, const TensorView& col, const std::optional<TensorView>& bias,
               const std::optional<TensorView>& residual, int64_t groups, const Axes& kernel,
               const Axes& stride, const Axes& padding, const Axes& dilation, bool channels_last,
               int64_t packed_cols, const std::string& activation, int threads,
               const std::optional<NamedConfig>& config) {
  constexpr const char* op = "blocksparse_conv";
  check_dims(op, "x", x, 5);
  check_dims(op, "out", out, 5);
  check_dtype(op, "x", x, values.dtype);
  check_dtype(op, "out", out, values.dtype);
  const ConvShape s =
      conv_shape(op, x.shape, out.shape, groups, kernel, stride, padding, dilation, channels_last);
  check_device(op, "out", out, "x", x);
  check_device(op, "the weight", values, "x", x);
  const Weight w =
      weight_of(op, values, crow, col, s.out_channels, s.taps(), s.group_in(), groups, packed_cols);
  const ConvArgs args{w,
                      s,
                      x.data,
                      bias_of(op, bias, s.out_channels, x.dtype, x),
                      activation_of(op, activation),
                      out.data,
                      threads,
                      residual_of(op, residual, out)};
  if (on_gpu(x)) return conv_cuda(op, args, x, config);
  GOSSAMER_CHECK(!config, op, ": a way of a GPU's, and x is on the CPU");
  conv(args);
}

void bind_dvalues(const TensorView& dvalues_out, const TensorView& dy, const TensorView& x,
                  const TensorView& crow, const TensorView& col, int64_t groups, const Axes& kernel,
                  const Axes& stride, const Axes& padding, const Axes& dilation, bool channels_last,
                  int threads) {
  constexpr const char* op = "blocksparse_dvalues";
  check_dims(op, "x", x, 5);
  check_dims(op, "dy", dy, 5);
  check_dtype(op, "x", x, dvalues_out.dtype);
  check_dtype(op, "dy", dy, dvalues_out.dtype);
  check_on_cpu(op, "x", x);
  const ConvShape s =
      conv_shape(op, x.shape, dy.shape, groups, kernel, stride, padding, dilation, channels_last);
  check_device(op, "dy", dy, "x", x);
  check_device(op, "dvalues", dvalues_out, "x", x);
  const Weight w =
      weight_of(op, dvalues_out, crow, col, s.out_channels, s.taps(), s.group_in(), groups);
  dvalues({w, s, x.data, dy.data, dvalues_out.data, threads});
}

template <class Config>
void report_strips(py::dict& report, const Config& config) {
  report["strip_images"] = config.strip_images;
  report["strip_rows"] = config.strip_rows;
  report["strip_width"] = config.strip_width;
  report["parts"] = config.parts;
}

// What a product is asked about without its tensors.
std::pair<ConvShape, Weight> described(const char* op, const std::array<int64_t, 5>& x,
                                       const std::array<int64_t, 5>& out, const std::string& dtype,
                                       int64_t rows, int64_t cols, int64_t nnz, int64_t groups,
                                       const Axes& kernel, const Axes& stride, const Axes& padding,
                                       const Axes& dilation, bool channels_last) {
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error(op + (": no kernels for " + dtype));
  check_size(op, "the batch", x[0], 0);
  const ConvShape s = conv_shape(op, x.data(), out.data(), groups, kernel, stride, padding,
                                 dilation, channels_last);
  Weight w = empty_weight(op, type, s.out_channels, s.taps(), s.group_in(), groups, rows, cols);
  GOSSAMER_CHECK(nnz >= 0 && nnz <= w.block_rows() * w.block_columns(), op, ": ", nnz,
                 " live blocks of ", w.block_rows() * w.block_columns());
  w.nnz = nnz;
  return {s, w};
}

std::vector<NamedConfig> ways(const std::array<int64_t, 5>& x, const std::array<int64_t, 5>& out,
                              const std::string& dtype, int64_t rows, int64_t cols, int64_t nnz,
                              int64_t groups, const Axes& kernel, const Axes& stride,
                              const Axes& padding, const Axes& dilation, bool channels_last,
                              const std::variant<int, py::dict>& device) {
  constexpr const char* op = "blocksparse_ways";
  const auto [s, w] = described(op, x, out, dtype, rows, cols, nnz, groups, kernel, stride, padding,
                                dilation, channels_last);
  return ways_cuda(op, s, w, device);
}

py::dict choose(const std::array<int64_t, 5>& x, const std::array<int64_t, 5>& out,
                const std::string& dtype, int64_t rows, int64_t cols, int64_t nnz, int64_t groups,
                const Axes& kernel, const Axes& stride, const Axes& padding, const Axes& dilation,
                bool channels_last, int threads,
                const std::optional<std::variant<int, py::dict>>& device) {
  constexpr const char* op = "blocksparse_choose";
  const auto [s, w] = described(op, x, out, dtype, rows, cols, nnz, groups, kernel, stride, padding,
                                dilation, channels_last);
  const DType type = w.dtype;
  if (device) return choose_cuda(op, s, w, *device);
  const auto [chosen, unit] = unit_in_force(type);
  py::dict report;
  report["target"] = name(chosen);
  if (unit == nullptr) {
    report["kernel"] = "serial";
    report["why"] = target() == Target::kSerial ? "no vector target is in force"
                                                : "float64 has the serial kernel only";
    report["threads"] = threads;
    return report;
  }
  const bool empty = s.batch * s.out_pixels() == 0;  // nothing to cut up
  if (tiles_in_force(w)) {
    const TileConfig config =
        empty ? TileConfig{} : choose_tile_config(collapsed(s), w, l2_bytes(), threads);
    report["target"] = name(Target::kAMXBF16);
    report["kernel"] = "tiles";
    report["why"] = "of the tiles that hold a live block enough is live";
    report["threads"] = std::max(config.threads, 1);
    report["depth"] = choose_depth(w);
    report["in_place"] = config.in_place;
    report_strips(report, config);
    return report;
  }
  const Kernel& chosen_kernel = choose_kernel(s, w, *unit);
  report["kernel"] = chosen_kernel.name;
  report["why"] = chosen_kernel.row_step == 1 ? "lanes are pixels, so blocks of any size fill them"
                                              : "lanes are outputs, which a block's rows fill";
  const ConvConfig config = empty ? ConvConfig{0, 0, 0, 0, 0, 0, 1}
                                  : choose_conv_config(collapsed(s), w, *unit, l2_bytes(), threads);
  report["threads"] = config.threads;
  report_strips(report, config);
  report["in_place"] = config.in_place;
  report["batch_outputs"] = config.batch_outputs;
  report["tile_vectors"] = config.tile_vectors;
  return report;
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("blocksparse_find_live", &bind_find_live, py::arg("dense"), py::arg("live"),
        py::arg("rows"), py::arg("cols"), py::arg("groups"), py::arg("threads"), release());
  m.def("blocksparse_gather", &bind_gather, py::arg("dense"), py::arg("crow_indices"),
        py::arg("col_indices"), py::arg("values"), py::arg("groups"), py::arg("threads"),
        release());
  m.def("blocksparse_to_dense", &bind_to_dense, py::arg("values"), py::arg("crow_indices"),
        py::arg("col_indices"), py::arg("dense"), py::arg("groups"), py::arg("threads"), release());
  m.def("blocksparse_validate", &bind_validate, py::arg("values"), py::arg("crow_indices"),
        py::arg("col_indices"), py::arg("out_channels"), py::arg("taps"), py::arg("group_in"),
        py::arg("groups"), release());
  m.def("blocksparse_conv", &bind_conv, py::arg("out"), py::arg("x"), py::arg("values"),
        py::arg("crow_indices"), py::arg("col_indices"), py::arg("bias"), py::arg("residual"),
        py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("channels_last"), py::arg("packed_cols"),
        py::arg("activation"), py::arg("threads"), py::arg("config") = py::none(), release());

  m.def("blocksparse_dvalues", &bind_dvalues, py::arg("dvalues"), py::arg("dy"), py::arg("x"),
        py::arg("crow_indices"), py::arg("col_indices"), py::arg("groups"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("channels_last"),
        py::arg("threads"), release());
  m.def("blocksparse_choose", &choose, py::arg("x"), py::arg("out"), py::arg("dtype"),
        py::arg("rows"), py::arg("cols"), py::arg("nnz"), py::arg("groups"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("channels_last"),
        py::arg("threads"), py::arg("device") = py::none());
  m.def("blocksparse_ways", &ways, py::arg("x"), py::arg("out"), py::arg("dtype"), py::arg("rows"),
        py::arg("cols"), py::arg("nnz"), py::arg("groups"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("channels_last"), py::arg("device"));
  m.attr("blocksparse_max_block") = kMaxBlock;
}

}  // namespace gossamer::blocksparse
