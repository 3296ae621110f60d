// The border of binary inputs: what Python hands over is checked here, once.
#include <pybind11/stl.h>

#include <limits>

#include "actsparse/spikes.h"
#include "actsparse/topk.h"
#include "common/border.h"
#include "common/ceil_div.h"
#include "common/py_tensor.h"

namespace py = pybind11;

namespace gossamer::actsparse::spikes {
namespace {

void check_cpu_matrix(const char* op, const char* what, const TensorView& t) {
  check_on_cpu(op, what, t);
  check_matrix(op, what, t);
}

template <class Word>
int64_t pack_words(const TensorView& x, Word one, const TensorView& bits, int threads) {
  return pack(x.as<const Word>(), x.strides[0], x.shape[0], x.shape[1], one, bits.as<uint8_t>(),
              threads);
}

void bind_pack(const TensorView& bits, const TensorView& x, int threads) {
  constexpr const char* op = "pack_spikes";
  check_cpu_matrix(op, "x", x);
  check_cpu_matrix(op, "bits", bits);
  check_dtype(op, "bits", bits, DType::kUInt8);
  const int64_t tokens = x.shape[0], features = x.shape[1];
  check_shape(op, "bits", bits, tokens, ceil_div(features, 8));
  check_contiguous(op, "bits", bits);
  check_adjacent_columns(op, "x", x);
  int64_t wrong = -1;
  switch (x.dtype) {
    case DType::kUInt8: wrong = pack_words<uint8_t>(x, 1, bits, threads); break;
    case DType::kBFloat16: wrong = pack_words<uint16_t>(x, 0x3f80, bits, threads); break;
    case DType::kFloat16: wrong = pack_words<uint16_t>(x, 0x3c00, bits, threads); break;
    case DType::kFloat32: wrong = pack_words<uint32_t>(x, 0x3f800000, bits, threads); break;
    case DType::kFloat64: wrong = pack_words<uint64_t>(x, 0x3ff0000000000000, bits, threads); break;
    default:
      throw py::type_error(std::string(op) + ": x is " + name(x.dtype) +
                           ", expected bool, uint8 or a floating dtype");
  }
  GOSSAMER_CHECK(wrong < 0, op, ": x[", wrong / features, ", ", wrong % features,
                 "] is neither 0 nor 1");
}

void bind_linear(const TensorView& out, const TensorView& bits, const TensorView& weight,
                 const std::optional<TensorView>& bias, int threads) {
  constexpr const char* op = "spike_linear";
  check_cpu_matrix(op, "bits", bits);
  check_cpu_matrix(op, "weight_kn", weight);
  check_cpu_matrix(op, "out", out);
  check_weight_dtype(op, "weight_kn", weight);
  const int64_t tokens = bits.shape[0], features = weight.shape[0], outputs = weight.shape[1];
  check_dtype(op, "bits", bits, DType::kUInt8);
  check_shape(op, "bits", bits, tokens, ceil_div(features, 8));
  check_contiguous(op, "bits", bits);
  GOSSAMER_CHECK(features <= std::numeric_limits<int32_t>::max(), op, ": ", features,
                 " features, expected below 2^31");
  check_adjacent_columns(op, "weight_kn", weight);
  check_dtype(op, "out", out, weight.dtype);
  check_shape(op, "out", out, tokens, outputs);
  check_contiguous(op, "out", out);
  const void* added = bias_of(op, bias, outputs, weight.dtype, weight);
  if (features % 8 != 0) {
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t last = bits.as<const uint8_t>()[(t + 1) * bits.shape[1] - 1];
      GOSSAMER_CHECK(last >> (features % 8) == 0, op, ": token ", t,
                     " has a bit set past its last feature, ", features - 1);
    }
  }
  const Set set = find_set(bits.as<const uint8_t>(), tokens, features, threads);
  topk::Bags bags{weight.dtype,
                  tokens,
                  outputs,
                  0,
                  set.begins.data(),
                  set.inputs.data(),
                  nullptr,
                  weight.data,
                  features,
                  weight.strides[0],
                  added,
                  out.data,
                  threads};
  if (weight.dtype == DType::kFloat64) {
    const std::vector<double> ones(set.inputs.size(), 1.0);
    bags.scales = ones.data();
    return topk::sum_bags(bags);
  }
  const std::vector<float> ones(set.inputs.size(), 1.0f);
  bags.scales = ones.data();
  topk::sum_bags(bags);
}

}  // namespace

void bind(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pack_spikes", &bind_pack, py::arg("bits"), py::arg("x"), py::arg("threads"), release());
  m.def("spike_linear", &bind_linear, py::arg("out"), py::arg("bits"), py::arg("weight_kn"),
        py::arg("bias"), py::arg("threads"), release());
}

}  // namespace gossamer::actsparse::spikes
