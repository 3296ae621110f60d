// The readable definition, for every dtype and any machine.
#include <vector>

#include "common/activate_serial.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {
namespace {

template <class T>
void convolve(const ConvArgs& args) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const auto& [taps, n_in, n_out, tap_offsets, in, out, in_order, out_order] = args.map;
  const int64_t c_in = args.channels.group_in(), c_out = args.channels.group_out();
  const auto* x = static_cast<const T*>(args.x);
  const auto* weights = static_cast<const T*>(args.weights);
  const auto* bias = static_cast<const T*>(args.bias);
  auto* y = static_cast<T*>(args.y);
  std::vector<int64_t> next(tap_offsets, tap_offsets + taps);  // of each tap, the pair not yet met
  std::vector<Real> sums(args.channels.out);
  for (int64_t rank = 0; rank < n_out; ++rank) {
    sums.assign(sums.size(), 0);
    for (int64_t t = 0; t < taps; ++t) {
      if (next[t] == tap_offsets[t + 1] || out[next[t]] != rank) continue;
      const T* row = x + args.map.in_row(in[next[t]++]) * args.x_stride;
      for (int64_t o = 0; o < args.channels.out; ++o) {
        const T* channels = row + o / c_out * c_in;
        const T* w = weights + t * c_in * args.channels.out + o;
        for (int64_t c = 0; c < c_in; ++c) {
          sums[o] += to_float(w[c * args.channels.out]) * to_float(channels[c]);
        }
      }
    }
    T* result = y + args.map.out_row(rank) * args.channels.out;
    for (int64_t o = 0; o < args.channels.out; ++o) {
      if (bias != nullptr) sums[o] += to_float(bias[o]);
      round_to(activate(sums[o], args.activation), result[o]);
    }
  }
}

template <class T>
void outer_products(const WeightGradArgs& args) {
  using Real = decltype(to_float(T{}));
  const KernelMap& map = args.map;
  const int64_t c_in = args.channels.group_in(), c_out = args.channels.group_out();
  const auto* x = static_cast<const T*>(args.x);
  const auto* dy = static_cast<const T*>(args.dy);
  auto* dw = static_cast<T*>(args.dw);
  for (int64_t t = 0; t < map.taps; ++t) {
    for (int64_t c = 0; c < c_in; ++c) {
      for (int64_t o = 0; o < args.channels.out; ++o) {
        Real sum = 0;
        for (int64_t p = map.tap_offsets[t]; p < map.tap_offsets[t + 1]; ++p) {
          const T* row = x + map.in_row(map.in[p]) * args.x_stride + o / c_out * c_in;
          const T* gradient = dy + map.out_row(map.out[p]) * args.dy_stride;
          sum += to_float(row[c]) * to_float(gradient[o]);
        }
        round_to(sum, dw[(t * c_in + c) * args.channels.out + o]);
      }
    }
  }
}

}  // namespace

void conv_serial(const ConvArgs& args) {
  switch (args.dtype) {
    case DType::kFloat64: return convolve<double>(args);
    case DType::kFloat32: return convolve<float>(args);
    case DType::kBFloat16: return convolve<BFloat16>(args);
    case DType::kFloat16: return convolve<Float16>(args);
    default: return;  // refused at the border
  }
}

void weight_grad_serial(const WeightGradArgs& args) {
  switch (args.dtype) {
    case DType::kFloat64: return outer_products<double>(args);
    case DType::kFloat32: return outer_products<float>(args);
    case DType::kBFloat16: return outer_products<BFloat16>(args);
    case DType::kFloat16: return outer_products<Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::pointcloud
