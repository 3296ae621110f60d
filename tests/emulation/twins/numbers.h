#pragma once
// The element types in registers: conversions as the hardware rounds them, and packing.
#include "common/dtype.h"
#include "twins/cuda_language.h"

namespace gossamer::ptx {

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

}  // namespace gossamer::ptx
