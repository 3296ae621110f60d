#pragma once
// The 2:4 GEMM with 8-bit and 4-bit weights, W[n,k] = value * scales[n, k / group]:
//
//   8-bit x 8-bit   y[m,n] = act(sum_k x[m,k] * value[n,k] * x_scales[m] * scales[n] + b[n])
//                   x of the values' type, or made so at first (quantize_rows), one scale a row of
//                   W; int8 sums are exact
//   weight only     y[m,n] = act(sum_k x[m,k] * value[n,k] * scales[n, k / group] + b[n])
//                   4-bit values, x in floating point, sums in float32
//
// Portable format, beside the indices of sparse24.h (G = ceil(K/4) groups of four a row):
//   values  int8 or float8_e4m3fn: [N, 2G]
//           4-bit: [N, G] bytes, the pair of a group each: slot 0 in the low four bits, two's
//           complement, -7 to 7
//   scales  float32 [N, ceil(K / group)]; group is K (one scale a row) or, for 4-bit values, a
//           multiple of 4
#include <cstdint>

#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

// Columns of an int8 weight whose sums fit 32 bits: a row keeps half of them, a group of four at a
// time, and a product is at most 128 * 128.
constexpr int64_t kMaxInt8Columns = (int64_t{1} << 18) - 4;

// Its dtype is kInt8, kE4M3, or kUInt8 for pairs of 4-bit numbers.
struct QuantizedWeight : Weight {
  int64_t group;
  const float* scales;

  bool four_bit() const { return dtype == DType::kUInt8; }
  int64_t scale_columns() const { return (k + group - 1) / group; }
  int64_t groups_per_scale() const { return (group + 3) / 4; }
};

struct QuantizedGemmArgs {
  QuantizedWeight weight;
  int64_t m;
  DType x_dtype;
  const void* x;          // [m, k], columns contiguous
  int64_t x_stride;       // between rows, in elements
  const float* x_scales;  // [m] of an x of 8 bits; null for others
  DType out_dtype;        // of out and bias: float32, bfloat16 or float16
  const void* bias;       // [n] or null
  Activation activation;
  void* out;  // [m, n], row-major
  int threads;
};

void gemm_quantized(const QuantizedGemmArgs& args);         // chooses target and kernel
void gemm_quantized_serial(const QuantizedGemmArgs& args);  // the definition

struct QuantizeRowsArgs {
  int64_t m, k;
  DType x_dtype;  // float32, bfloat16 or float16
  const void* x;  // [m, k], columns contiguous
  int64_t x_stride;
  DType number_dtype;  // int8 or float8_e4m3fn
  void* numbers;       // [m, k]
  float* scales;       // [m]
  int threads;
};
// What ops.quantize_rows says.
void quantize_rows(const QuantizeRowsArgs& args);

void bind_quantized(pybind11::module_& m);

}  // namespace gossamer::sparse24
