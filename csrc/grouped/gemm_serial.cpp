// The readable definition, for every dtype and any machine.
#include "common/activate_serial.h"
#include "grouped/grouped.h"

namespace gossamer::grouped {
namespace {

template <class T>
void gemm_tokens(const GroupedArgs& args) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const auto* x = static_cast<const T*>(args.x);
  const auto* weights = static_cast<const T*>(args.weights);
  const auto* bias = static_cast<const T*>(args.bias);
  auto* out = static_cast<T*>(args.out);
  for (int64_t e = 0; e < args.experts; ++e) {
    for (int64_t t = args.begin(e); t < args.ends[e]; ++t) {
      for (int64_t n = 0; n < args.n; ++n) {
        const T* w = weights + (e * args.n + n) * args.k;
        Real sum = 0;
        for (int64_t k = 0; k < args.k; ++k) {
          sum += to_float(w[k]) * to_float(x[t * args.x_stride + k]);
        }
        if (bias != nullptr) sum += to_float(bias[e * args.n + n]);
        round_to(activate(sum, args.activation), out[t * args.n + n]);
      }
    }
  }
}

}  // namespace

void gemm_serial(const GroupedArgs& args) {
  switch (args.dtype) {
    case DType::kFloat64: return gemm_tokens<double>(args);
    case DType::kFloat32: return gemm_tokens<float>(args);
    case DType::kBFloat16: return gemm_tokens<BFloat16>(args);
    case DType::kFloat16: return gemm_tokens<Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::grouped
