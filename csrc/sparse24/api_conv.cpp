// The border of 2:4 convolutions.
#include <pybind11/stl.h>

#include "blocksparse/conv_config.h"
#include "common/cache_size.h"
#include "common/conv_border.h"
#include "common/py_tensor.h"
#include "sparse24/api.h"
#include "sparse24/conv.h"
#include "sparse24/conv_config.h"
#include "sparse24/conv_pairs.h"

namespace py = pybind11;

namespace gossamer::sparse24 {

int64_t conv_columns(const char* op, const ConvShape& s) {
  gossamer::check_size(op, "the number of input channels", s.group_in(), 1);
  gossamer::check_size(op, "the number of output channels", s.out_channels, 1);
  GOSSAMER_CHECK(s.out_channels % s.groups == 0, op, ": ", s.out_channels, " output channels in ",
                 s.groups, " groups");
  gossamer::check_size(op, "the number of taps", s.taps(), 1);
  const int64_t columns = s.taps() * padded_channels(s);
  gossamer::check_size(op, "the number of weights of an output", columns, 1);
  return columns;
}

namespace {

// A weight as pairs, which lead nowhere outside of their words.
Weight pairs(const char* op, const TensorView& words, DType dtype, const PairShape& s) {
  check_dims(op, "pairs", words, 1);
  check_on_cpu(op, "pairs", words);
  check_dtype(op, "pairs", words, DType::kInt32);
  check_pairs(words.as<const uint32_t>(), words.shape[0], s);
  return {dtype,   s.groups * s.group_out,    s.taps * s.tap_groups() * 4, nullptr,
          nullptr, words.as<const uint32_t>()};
}

PairShape pair_shape_of(const char* op, int64_t out_channels, int64_t group_in, int64_t taps,
                        int64_t groups) {
  for (const int64_t size : {out_channels, group_in, taps, groups}) {
    gossamer::check_size(op, "a size of the weight", size, 1);
  }
  GOSSAMER_CHECK(out_channels % groups == 0, op, ": ", out_channels, " output channels in ", groups,
                 " groups");
  const PairShape s{groups, out_channels / groups, group_in, taps};
  GOSSAMER_CHECK(s.tap_groups() <= (int64_t{1} << 28) / taps && s.most_words() < int64_t{1} << 31,
                 op, ": a weight of ", out_channels, " x ", group_in, " x ", taps,
                 " is too large for pairs");
  return s;
}

int64_t bind_to_pairs(const TensorView& values, const TensorView& indices, int64_t group_in,
                      int64_t taps, int64_t groups, const TensorView& out, int threads) {
  constexpr const char* op = "sparse24_conv_to_pairs";
  check_matrix(op, "values", values);
  check_on_cpu(op, "values", values);
  const PairShape s = pair_shape_of(op, values.shape[0], group_in, taps, groups);
  panel_dtype(name(values.dtype));
  const Weight w = portable(op, values, indices, values.shape[0], taps * s.tap_groups() * 4);
  check_device(op, "pairs", out, "values", values);
  check_dtype(op, "pairs", out, DType::kInt32);
  check_vector(op, "pairs", out, s.most_words());
  to_pairs(w, s, out.as<uint32_t>(), threads);
  return close_up(s, out.as<uint32_t>());
}

void bind_from_pairs(const TensorView& words, const TensorView& values, const TensorView& indices,
                     int64_t group_in, int64_t taps, int64_t groups) {
  constexpr const char* op = "sparse24_conv_from_pairs";
  check_matrix(op, "values", values);
  check_on_cpu(op, "values", values);
  const PairShape s = pair_shape_of(op, values.shape[0], group_in, taps, groups);
  panel_dtype(name(values.dtype));
  const Weight w = portable(op, values, indices, values.shape[0], taps * s.tap_groups() * 4);
  pairs(op, words, values.dtype, s);
  from_pairs(words.as<const uint32_t>(), s, w, values.data, indices.as<uint8_t>());
}

void bind_product(const TensorView& out, const TensorView& x, const TensorView& weight,
                  const std::optional<TensorView>& indices, const std::optional<TensorView>& bias,
                  const std::optional<TensorView>& residual, int64_t groups, const Axes& kernel,
                  const Axes& stride, const Axes& padding, const Axes& dilation, bool channels_last,
                  const std::string& activation, int threads) {
  constexpr const char* op = "sparse24_conv";
  check_dims(op, "x", x, 5);
  check_dims(op, "out", out, 5);
  check_on_cpu(op, "x", x);
  check_device(op, "out", out, "x", x);
  check_weight_dtype(op, "x", x);
  check_dtype(op, "out", out, x.dtype);
  check_device(op, "the weight", weight, "x", x);
  const ConvShape s =
      conv_shape(op, x.shape, out.shape, groups, kernel, stride, padding, dilation, channels_last);
  const int64_t k = conv_columns(op, s);
  const Weight w = indices ? portable(op, weight, *indices, s.out_channels, k)
                           : pairs(op, weight, x.dtype, pair_shape(s));
  if (indices) check_dtype(op, "the weight", weight, x.dtype);
  conv({w, s, x.data, bias_of(op, bias, s.out_channels, x.dtype, x), activation_of(op, activation),
        out.data, threads, residual_of(op, residual, out)});
}

py::dict choose(const std::array<int64_t, 5>& x, const std::array<int64_t, 5>& out,
                const std::string& dtype, bool packed, int64_t groups, const Axes& kernel,
                const Axes& stride, const Axes& padding, const Axes& dilation, bool channels_last,
                int threads) {
  constexpr const char* op = "sparse24_conv_choose";
  const DType type = dlpack::dtype_from_name(dtype);
  if (!is_weight_dtype(type)) throw py::type_error(op + (": no kernels for " + dtype));
  gossamer::check_size(op, "the batch", x[0], 0);
  const ConvShape s = conv_shape(op, x.data(), out.data(), groups, kernel, stride, padding,
                                 dilation, channels_last);
  conv_columns(op, s);
  const ConvChoice choice = choose_conv_kernel(s, type, gossamer::target(), packed);
  const bool serial = choice.kernel == ConvKernel::kSerial;
  py::dict report;
  report["kernel"] = serial ? "serial" : choice.kernel == ConvKernel::kDense ? "dense" : "pairs";
  report["why"] = choice.why;
  report["target"] = name(serial ? Target::kSerial : conv_target(gossamer::target()));
  report["threads"] = threads;
  if (choice.kernel != ConvKernel::kPairs || s.batch * s.out_pixels() == 0) return report;
  const int64_t lanes = traits(conv_target(gossamer::target())).lanes;
  const blocksparse::ConvConfig config =
      choose_pair_strips(blocksparse::collapsed(s), lanes, l1_bytes(), l2_bytes(), threads);
  report["threads"] = config.threads;
  report["strip_images"] = config.strip_images;
  report["strip_rows"] = config.strip_rows;
  report["strip_width"] = config.strip_width;
  report["parts"] = config.parts;
  return report;
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("sparse24_conv", &bind_product, py::arg("out"), py::arg("x"), py::arg("weight"),
        py::arg("indices"), py::arg("bias"), py::arg("residual"), py::arg("groups"),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("channels_last"), py::arg("activation"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "sparse24_conv_most_pair_words",
      [](int64_t out_channels, int64_t group_in, int64_t taps, int64_t groups) {
        return pair_shape_of("Sparse24ConvPanels", out_channels, group_in, taps, groups)
            .most_words();
      },
      py::arg("out_channels"), py::arg("group_in"), py::arg("taps"), py::arg("groups"));
  m.def("sparse24_conv_to_pairs", &bind_to_pairs, py::arg("values"), py::arg("indices"),
        py::arg("group_in"), py::arg("taps"), py::arg("groups"), py::arg("pairs"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("sparse24_conv_from_pairs", &bind_from_pairs, py::arg("pairs"), py::arg("values"),
        py::arg("indices"), py::arg("group_in"), py::arg("taps"), py::arg("groups"),
        py::call_guard<py::gil_scoped_release>());
  m.def("sparse24_conv_choose", &choose, py::arg("x"), py::arg("out"), py::arg("dtype"),
        py::arg("packed"), py::arg("groups"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("channels_last"), py::arg("threads"));
}

}  // namespace gossamer::sparse24
