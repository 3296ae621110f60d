#pragma once
// Element types that cross the border, and the conversions the portable code needs.
#include <cstdint>
#include <cstring>

namespace gossamer {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kE4M3,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64
};

static constexpr const char* name(DType t) {
  switch (t) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kE4M3: return "float8_e4m3fn";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kInt16: return "int16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
  }
  return "?";
}

static constexpr int64_t size_of(DType t) {
  switch (t) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16: return 2;
    case DType::kE4M3:
    case DType::kInt8:
    case DType::kUInt8: return 1;
  }
  return 0;
}

// Small floats as storage: arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4M3 {  // 8-bit float: 4 bits of exponent, 3 of mantissa, no infinity
  uint8_t bits;
};

// `static`: units compiled for different instruction sets each keep their own copy.
static inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

static inline double to_float(double x) { return x; }
static inline float to_float(float x) { return x; }
static inline float to_float(BFloat16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
static inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(subnormal));
}
static inline float to_float(E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_to_float(0x7fffffffu);  // the one NaN
  if (magnitude >= 0x08u) return bits_to_float(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return bits_to_float(sign | float_to_bits(subnormal));
}

// Calls body(T{}) with the type of a dtype that weights may have.
template <class Body>
static inline void visit_floats(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double{});
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    default: return;  // refused at the border
  }
}

// Round to nearest even, as torch does.
static inline void round_to(double x, double& out) { out = x; }
static inline void round_to(float x, float& out) { out = x; }
static inline void round_to(float x, BFloat16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);  // NaN stays quiet
}
static inline void round_to(float x, Float16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // past 65504 after rounding
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to steps of 2^-24
    rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t rebased = magnitude - (112u << 23);
    rounded = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | rounded);
}

}  // namespace gossamer
