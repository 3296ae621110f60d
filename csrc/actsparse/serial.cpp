// The readable definitions, for every dtype and any machine.
#include <cmath>

#include "actsparse/actsparse.h"
#include "common/activate_serial.h"

namespace gossamer::actsparse {
namespace {

template <class T>
void linear_of(const LinearArgs& args) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const auto* weight = static_cast<const T*>(args.weight);
  const auto* bias = static_cast<const T*>(args.bias);
  const auto threshold = static_cast<Real>(args.threshold);
  for (int64_t m = 0; m < args.m; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    T* out = static_cast<T*>(args.out) + m * args.n;
    for (int64_t n = 0; n < args.n; ++n) {
      Real sum = 0;
      for (int64_t k = 0; k < args.k; ++k) {
        const Real value = to_float(x[k]);
        const bool inactive = std::abs(value) <= threshold;  // false for a NaN
        if (!inactive) sum += value * to_float(weight[k * args.weight_stride + n]);
      }
      if (bias != nullptr) sum += to_float(bias[n]);
      round_to(activate(sum, args.activation), out[n]);
    }
  }
}

template <class T>
void outputs_of(const OutputsArgs& args) {
  using Real = decltype(to_float(T{}));
  const auto* bias = static_cast<const T*>(args.bias);
  for (int64_t m = 0; m < args.m; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    T* out = static_cast<T*>(args.out) + m * args.n;
    for (int64_t n = 0; n < args.n; ++n) {
      out[n] = T{};
      if (args.wanted[m * args.n + n] == 0) continue;
      const T* w = static_cast<const T*>(args.weight) + n * args.weight_stride;
      Real sum = 0;
      for (int64_t k = 0; k < args.k; ++k) sum += to_float(x[k]) * to_float(w[k]);
      if (bias != nullptr) sum += to_float(bias[n]);
      round_to(activate(sum, args.activation), out[n]);
    }
  }
}

template <class Call>
void for_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64: return call(double{});
    case DType::kFloat32: return call(float{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat16: return call(Float16{});
    default: return;  // refused at the border
  }
}

}  // namespace

void linear_serial(const LinearArgs& args) {
  for_dtype(args.dtype, [&]<class T>(T) { linear_of<T>(args); });
}

void outputs_serial(const OutputsArgs& args) {
  for_dtype(args.dtype, [&]<class T>(T) { outputs_of<T>(args); });
}

}  // namespace gossamer::actsparse
