#pragma once
// The element types in registers: conversions as the hardware rounds them, and packing.
#include "common/dtype.h"
#include "twins/cuda_language.h"

namespace gossamer::emulation {

// a b + c in float32, rounded to the neighbour with an odd last bit where it is not exact: whoever
// rounds that to a narrower type gets what one rounding of the exact value gives. The products of
// 16-bit floats are exact in float64, and Knuth's sum of two has its error beside it.
inline float fma_to_odd(float a, float b, float c) {
  const double product = double{a} * b, sum = product + c;
  const double z = sum - product, error = (product - (sum - z)) + (c - z);
  const auto nearest = static_cast<float>(sum);
  if (!std::isfinite(nearest)) return nearest;
  const double above = (sum - nearest) + error;  // of the exact value, over the nearest float32
  if (above == 0.0 || (std::bit_cast<uint32_t>(nearest) & 1) != 0) return nearest;
  return std::nextafter(nearest, above > 0 ? INFINITY : -INFINITY);
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

template <class T>
T keep(T value) {
  return value;
}

// What products of T are summed in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return gossamer::to_float(x); }
inline float to_float(Float16 x) { return gossamer::to_float(x); }
inline float to_float(E4M3 x) { return gossamer::to_float(x); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  BFloat16 rounded;
  round_to(x, rounded);
  return x != x ? BFloat16{0x7fff} : rounded;  // the hardware's NaN
}
template <>
inline Float16 from_float<Float16>(float x) {
  Float16 rounded;
  round_to(x, rounded);
  return x != x ? Float16{0x7fff} : rounded;
}
template <>
inline E4M3 from_float<E4M3>(float x) {
  if (x != x) return {0x7f};
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  const float magnitude = std::fabs(x);
  if (magnitude >= 448.0f) return {static_cast<uint8_t>(sign | 0x7e)};  // .satfinite
  // Steps of 2^-9 below 2^-6; above, three bits after the leading one.
  const int exponent = std::max(magnitude > 0.0f ? std::ilogb(magnitude) : -6, -6);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  // A carry out of the mantissa is the next exponent: the code counts steps through both.
  const int code = std::min((exponent + 6) * 8 + steps, 0x7e);
  return {static_cast<uint8_t>(sign | code)};
}
template <>
inline int8_t from_float<int8_t>(float x) {
  if (x != x) return 0;
  return static_cast<int8_t>(std::nearbyint(std::min(std::max(x, -128.0f), 127.0f)));
}

// Two values in one register, the first in the low half.
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t two) {
  return {ptx::to_float(T{static_cast<uint16_t>(two)}),
          ptx::to_float(T{static_cast<uint16_t>(two >> 16)})};
}
// a b + c of both halves, each rounded once.
template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  return pack<T>(emulation::fma_to_odd(x.x, y.x, z.x), emulation::fma_to_odd(x.y, y.y, z.y));
}
inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return from_float<E4M3>(x0).bits | from_float<E4M3>(x1).bits << 8 |
         from_float<E4M3>(x2).bits << 16 | static_cast<uint32_t>(from_float<E4M3>(x3).bits) << 24;
}

// Ten bits after the leading one, a tie away from zero; the register keeps the other 13 bits zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fffffffu;
  return std::isinf(x) ? bits : (bits + 0x1000u) & ~0x1fffu;
}

// Bit by bit the entry 4a + 2b + c of the table.
template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t entry = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    d |= (static_cast<uint32_t>(Table) >> entry & 1) << bit;
  }
  return d;
}

}  // namespace gossamer::ptx
