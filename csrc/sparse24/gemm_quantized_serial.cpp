// The readable definition of the quantised GEMM, for every value type and any machine.
#include "common/activate_serial.h"
#include "common/parallel.h"
#include "sparse24/quantized.h"

namespace gossamer::sparse24 {
namespace {

struct FourBitPair {
  uint8_t bits;
};

// Slot p of the weight, counted through all rows, in the type its products are summed in. int64,
// since an int32 sum could overflow from K = 266286 on.
int64_t stored(const int8_t* values, int64_t p) { return values[p]; }
float stored(const E4M3* values, int64_t p) { return to_float(values[p]); }
float stored(const FourBitPair* values, int64_t p) {
  const int nibble = values[p / 2].bits >> (4 * (p % 2)) & 15;
  return static_cast<float>((nibble ^ 8) - 8);
}

int64_t factor(int8_t x) { return x; }
template <class X>
float factor(X x) {
  return to_float(x);
}

float load(DType dtype, const void* from, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(from)[i]);
    case DType::kFloat16: return to_float(static_cast<const Float16*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

void store(float y, DType dtype, void* to, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return round_to(y, static_cast<BFloat16*>(to)[i]);
    case DType::kFloat16: return round_to(y, static_cast<Float16*>(to)[i]);
    default: return round_to(y, static_cast<float*>(to)[i]);
  }
}

template <class Value, class X>
float dot(const QuantizedGemmArgs& args, int64_t m, int64_t n) {
  const QuantizedWeight& w = args.weight;
  const auto* values = static_cast<const Value*>(w.values);
  const auto* x = static_cast<const X*>(args.x) + m * args.x_stride;
  const float x_scale = args.x_scales == nullptr ? 1.0f : args.x_scales[m];
  float y = 0;
  for (int64_t s = 0; s < w.scale_columns(); ++s) {
    const int64_t begin = s * w.groups_per_scale();
    const int64_t end = std::min(begin + w.groups_per_scale(), w.groups());
    decltype(stored(values, 0)) sum = 0;
    for (int64_t g = begin; g < end; ++g) {
      const int nibble = w.indices[n * w.index_bytes() + g / 2] >> (4 * (g % 2)) & 15;
      for (int slot = 0; slot < 2; ++slot) {
        const int64_t k = 4 * g + (nibble >> (2 * slot) & 3);
        if (k < w.k) sum += stored(values, (n * w.groups() + g) * 2 + slot) * factor(x[k]);
      }
    }
    y += static_cast<float>(sum) * x_scale * w.scales[n * w.scale_columns() + s];
  }
  return y;
}

template <class Value, class X>
void gemm_outputs(const QuantizedGemmArgs& args) {
  const int64_t n = args.weight.n, outputs = args.m * n;
  // A slot takes about as long as eight bytes of memory traffic.
  const int64_t work = 8 * outputs * 2 * args.weight.groups();
  parallel_ranges(threads_for_bytes(args.threads, work), outputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float y = dot<Value, X>(args, i / n, i % n);
      if (args.bias != nullptr) y += load(args.out_dtype, args.bias, i % n);
      store(activate(y, args.activation), args.out_dtype, args.out, i);
    }
  });
}

}  // namespace

void gemm_quantized_serial(const QuantizedGemmArgs& args) {
  switch (args.x_dtype) {  // the border has checked that the weight goes with it
    case DType::kInt8: return gemm_outputs<int8_t, int8_t>(args);
    case DType::kE4M3: return gemm_outputs<E4M3, E4M3>(args);
    case DType::kFloat32: return gemm_outputs<FourBitPair, float>(args);
    case DType::kBFloat16: return gemm_outputs<FourBitPair, BFloat16>(args);
    case DType::kFloat16: return gemm_outputs<FourBitPair, Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::sparse24
