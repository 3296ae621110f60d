// The readable definitions, for every dtype and any machine.
#include "common/activate_serial.h"
#include "csr/csr.h"

namespace gossamer::csr {
namespace {

template <class T, class Index>
void linear_rows(const LinearArgs& args) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const Pattern& pattern = args.pattern;
  const auto* values = static_cast<const T*>(args.values);
  const auto* bias = static_cast<const T*>(args.bias);
  for (int64_t m = 0; m < args.rows; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    T* out = static_cast<T*>(args.out) + m * pattern.n;
    for (int64_t i = 0; i < pattern.n; ++i) {
      Real sum = 0;
      for (int64_t j = pattern.crow[i]; j < pattern.crow[i + 1]; ++j) {
        sum += to_float(values[j]) * to_float(x[pattern.column<Index>(j)]);
      }
      if (bias != nullptr) sum += to_float(bias[i]);
      round_to(activate(sum, args.activation), out[i]);
    }
  }
}

template <class T, class Index>
void dvalues_rows(const DvaluesArgs& args) {
  using Real = decltype(to_float(T{}));
  const Pattern& pattern = args.pattern;
  const auto* x = static_cast<const T*>(args.x);
  const auto* dy = static_cast<const T*>(args.dy);
  for (int64_t i = 0; i < pattern.n; ++i) {
    for (int64_t j = pattern.crow[i]; j < pattern.crow[i + 1]; ++j) {
      const int64_t column = pattern.column<Index>(j);
      Real sum = 0;
      for (int64_t m = 0; m < args.rows; ++m) {
        sum += to_float(dy[m * args.dy_stride + i]) * to_float(x[m * args.x_stride + column]);
      }
      round_to(sum, static_cast<T*>(args.dvalues)[j]);
    }
  }
}

}  // namespace

void linear_serial(const LinearArgs& args) {
  visit_floats(args.dtype, [&]<class T>(T) {
    args.pattern.wide ? linear_rows<T, int32_t>(args) : linear_rows<T, int16_t>(args);
  });
}

void dvalues_serial(const DvaluesArgs& args) {
  visit_floats(args.dtype, [&]<class T>(T) {
    args.pattern.wide ? dvalues_rows<T, int32_t>(args) : dvalues_rows<T, int16_t>(args);
  });
}

}  // namespace gossamer::csr
