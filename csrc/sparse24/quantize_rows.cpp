// Rows of x as 8-bit numbers and their scales, by the largest magnitude of each. The loops are
// written for the compiler to turn into vectors: no branches, numbers and bits of one width.
#include <algorithm>
#include <bit>
#include <limits>

#include "common/parallel.h"
#include "common/scratch.h"
#include "sparse24/quantized.h"

namespace gossamer::sparse24 {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

thread_local Scratch row_scratch;

template <class T>
const float* as_floats(const T* x, int64_t k, float* scratch) {
  for (int64_t i = 0; i < k; ++i) scratch[i] = to_float(x[i]);
  return scratch;
}
const float* as_floats(const float* x, int64_t, float*) { return x; }

// To nearest even, of at most 2^22: the sum has no bits left for a fraction.
float round_even(float x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

int8_t rounded(float x, int8_t) { return static_cast<int8_t>(round_even(x)); }

// x in [-448, 448]. From 2^-6 on the mantissa is cut to three bits; below, steps are of 2^-9.
E4M3 rounded(float x, E4M3) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t cut = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const auto steps = static_cast<uint32_t>(
      static_cast<int32_t>(round_even(std::bit_cast<float>(magnitude) * 0x1p9f)));
  const uint32_t number = magnitude >= 0x3c800000u ? cut - (120u << 3) : steps;
  return {static_cast<uint8_t>((bits >> 24 & 0x80u) | number)};
}

// The scale, or NaN where an entry is not finite; then the numbers are 0.
template <class Number>
float quantize_row(const float* x, int64_t k, float largest, Number* numbers) {
  int32_t top = 0;  // bits of magnitudes, in whose order they are
  for (int64_t i = 0; i < k; ++i) {
    top = std::max(top, static_cast<int32_t>(std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu));
  }
  if (static_cast<uint32_t>(top) >= kInfinity) {
    std::fill_n(numbers, k, Number{});
    return std::numeric_limits<float>::quiet_NaN();
  }
  const auto absmax = std::bit_cast<float>(top);
  const float scale =
      absmax == 0 ? 1.0f : std::max(absmax / largest, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < k; ++i) {
    const float scaled = x[i] / scale;
    numbers[i] = rounded(std::min(std::max(scaled, -largest), largest), Number{});
  }
  return scale;
}

template <class X, class Number>
void quantize_all(const QuantizeRowsArgs& args, float largest) {
  const int team = threads_for_bytes(args.threads, 8 * args.m * args.k);
  parallel_ranges(team, args.m, [&](int64_t begin, int64_t end) {
    auto* scratch = static_cast<float*>(row_scratch.at_least(args.k * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
      const float* x =
          as_floats(static_cast<const X*>(args.x) + row * args.x_stride, args.k, scratch);
      args.scales[row] =
          quantize_row(x, args.k, largest, static_cast<Number*>(args.numbers) + row * args.k);
    }
  });
}

template <class X>
void quantize_from(const QuantizeRowsArgs& args) {
  if (args.number_dtype == DType::kInt8) return quantize_all<X, int8_t>(args, 127.0f);
  quantize_all<X, E4M3>(args, 448.0f);
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args) {
  switch (args.x_dtype) {
    case DType::kFloat32: return quantize_from<float>(args);
    case DType::kBFloat16: return quantize_from<BFloat16>(args);
    case DType::kFloat16: return quantize_from<Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::sparse24
