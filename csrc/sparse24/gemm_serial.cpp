// The readable definition, for every dtype and any machine.
#include "common/activate_serial.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {
namespace {

template <class T>
void gemm_rows(const GemmArgs& args) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const Weight& w = args.weight;
  const auto* x = static_cast<const T*>(args.x);
  const auto* values = static_cast<const T*>(w.values);
  const auto* bias = static_cast<const T*>(args.bias);
  auto* out = static_cast<T*>(args.out);
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t n = 0; n < w.n; ++n) {
      Real sum = 0;
      for (int64_t g = 0; g < w.groups(); ++g) {
        const int nibble = w.indices[n * w.index_bytes() + g / 2] >> (4 * (g % 2)) & 15;
        for (int slot = 0; slot < 2; ++slot) {
          const int64_t k = 4 * g + (nibble >> (2 * slot) & 3);
          if (k >= w.k) continue;
          sum += to_float(values[(n * w.groups() + g) * 2 + slot]) *
                 to_float(x[m * args.x_stride + k]);
        }
      }
      if (bias != nullptr) sum += to_float(bias[n]);
      round_to(activate(sum, args.activation), out[m * w.n + n]);
    }
  }
}

}  // namespace

void gemm_serial(const GemmArgs& args) {
  switch (args.weight.dtype) {
    case DType::kFloat64: return gemm_rows<double>(args);
    case DType::kFloat32: return gemm_rows<float>(args);
    case DType::kBFloat16: return gemm_rows<BFloat16>(args);
    case DType::kFloat16: return gemm_rows<Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::sparse24
