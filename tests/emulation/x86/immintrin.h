#pragma once
// AVX-512 and AMX on CPUs that have AVX2 alone: comes first on the include path of the units that
// are compiled for them, and defines their intrinsics by SIMDe, and by what stands below where
// SIMDe has none.
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {
namespace {

template <class Lane, class Vector>
auto lanes_of(Vector v) {
  return std::bit_cast<std::array<Lane, sizeof(Vector) / sizeof(Lane)>>(v);
}

// Lane by lane, what a function makes of its number.
template <class Vector, class Lane, class Make>
Vector make(const Make& lane) {
  std::array<Lane, sizeof(Vector) / sizeof(Lane)> lanes;
  for (size_t i = 0; i < lanes.size(); ++i) lanes[i] = lane(i);
  return std::bit_cast<Vector>(lanes);
}

inline simde__m512i zero_extend(__m256i a) {
  const auto from = lanes_of<uint32_t>(a);
  return make<simde__m512i, uint32_t>([&](size_t i) { return i < 8 ? from[i] : 0; });
}

inline simde__m512 permutevar(simde__m512 a, simde__m512i index) {
  const auto from = lanes_of<float>(a);
  const auto which = lanes_of<uint32_t>(index);
  return make<simde__m512, float>([&](size_t i) { return from[(i & ~3u) + (which[i] & 3u)]; });
}

inline uint32_t below_epu16(simde__m512i a, simde__m512i b) {
  const auto first = lanes_of<uint16_t>(a), second = lanes_of<uint16_t>(b);
  uint32_t mask = 0;
  for (size_t i = 0; i < first.size(); ++i) mask |= uint32_t{first[i] < second[i]} << i;
  return mask;
}

// Masked loads and stores touch the lanes of the mask alone, as the instructions do: SIMDe's read
// all of them.
template <class Vector>
Vector load_lanes(uint32_t mask, const void* p) {
  return make<Vector, uint16_t>([&](size_t i) {
    uint16_t lane = 0;
    if (mask >> i & 1) std::memcpy(&lane, static_cast<const char*>(p) + 2 * i, 2);
    return lane;
  });
}

inline void store_lanes(void* p, uint32_t mask, simde__m512i a) {
  const auto lanes = lanes_of<uint16_t>(a);
  for (size_t i = 0; i < lanes.size(); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + 2 * i, &lanes[i], 2);
  }
}

inline __m256i to_float16(simde__m512 a) {
  const auto lanes = lanes_of<float>(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(&lanes[8]), _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(_mm256_loadu_ps(&lanes[0]), _MM_FROUND_TO_NEAREST_INT));
}

// Subnormal numbers count as zero.
inline uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (std::fpclassify(x) == FP_SUBNORMAL) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline simde__m256bh to_bfloat16(simde__m512 a) {
  const auto lanes = lanes_of<float>(a);
  return make<simde__m256bh, uint16_t>([&](size_t i) { return to_bfloat16(lanes[i]); });
}

inline simde__m512bh to_bfloat16(simde__m512 high, simde__m512 low) {
  const auto first = lanes_of<float>(low), second = lanes_of<float>(high);
  return make<simde__m512bh, uint16_t>(
      [&](size_t i) { return to_bfloat16(i < 16 ? first[i] : second[i - 16]); });
}

}  // namespace
}  // namespace emulated

#undef _cvtu32_mask32
#undef _mm256_maskz_loadu_epi16
#undef _mm512_cmplt_epu16_mask
#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtps_ph
#undef _mm512_cvtss_f32
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_mask_storeu_epi16
#undef _mm512_maskz_loadu_epi16
#undef _mm512_permutevar_ps
#undef _mm512_zextsi256_si512
#define _cvtu32_mask32(bits) static_cast<simde__mmask32>(bits)
#define _mm256_maskz_loadu_epi16 emulated::load_lanes<__m256i>
#define _mm512_cmplt_epu16_mask emulated::below_epu16
#define _mm512_cvtne2ps_pbh emulated::to_bfloat16
#define _mm512_cvtneps_pbh emulated::to_bfloat16
#define _mm512_cvtps_ph(a, rounding) emulated::to_float16(a)
#define _mm512_cvtss_f32(a) emulated::lanes_of<float>(a)[0]
#define _mm512_mask_cmp_ps_mask(mask, a, b, how) \
  static_cast<simde__mmask16>((mask) & simde_mm512_cmp_ps_mask(a, b, how))
#define _mm512_mask_storeu_epi16 emulated::store_lanes
#define _mm512_maskz_loadu_epi16 emulated::load_lanes<simde__m512i>
#define _mm512_permutevar_ps emulated::permutevar
#define _mm512_zextsi256_si512 emulated::zero_extend

#include "tiles.h"
