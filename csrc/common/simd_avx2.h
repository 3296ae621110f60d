#pragma once
// The vocabulary of simd_avx512.h in registers of eight lanes. Included by units compiled for AVX2
// only.
#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_offsets.h"

namespace gossamer {
namespace {

struct Simd : SimdOffsets {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F negate(F a) { return _mm256_xor_ps(a, set1(-0.0f)); }
  static F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static F where_negative(F sign, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(sign, zero(), _CMP_LT_OQ));
  }
  static uint32_t lanes_not_up_to(F a, F limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_NLE_UQ)));
  }

  static I set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I min_unsigned(I a, I b) { return _mm256_min_epu32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int N>
  static I shift_right(I a) {
    return _mm256_srli_epi32(a, N);
  }
  template <int N>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, N);
  }
  template <int Which>
  static F four_bit(I a) {
    return to_float(_mm256_srai_epi32(shift_left<28 - 4 * Which>(a), 28));
  }
  static uint32_t above(I a, I b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(as_float(_mm256_cmpgt_epi32(a, b))));
  }
  static I half(I a) { return _mm256_srai_epi32(a, 1); }
  static I round(F a) { return _mm256_cvtps_epi32(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static I as_int(F a) { return _mm256_castps_si256(a); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const BFloat16* p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16));
  }
  static F load(const Float16* p) { return _mm256_cvtph_ps(load16(p)); }
  static I load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static void store(BFloat16* p, F a) {
    store16(p, low_words(shift_right<16>(round_to_bfloat16(a))));
  }
  static void store(Float16* p, F a) { store16(p, to_float16(a)); }
  static void store_words(uint32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static F broadcast(const uint32_t* p) {
    return as_float(_mm256_set1_epi32(static_cast<int>(*p)));
  }

  static I load_index(const int32_t* p) { return load_words(reinterpret_cast<const uint32_t*>(p)); }
  static I load_index(const int16_t* p) { return _mm256_cvtepi16_epi32(load16(p)); }
  static I times(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F gather(const float* p, I index) { return _mm256_i32gather_ps(p, index, 4); }

  // Four floats in both halves, and in each lane that of them which the index names by its two low
  // bits.
  static F broadcast4(const float* p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
  static F pick(F four, I index) { return _mm256_permutevar_ps(four, index); }

  static I broadcast8(const void* p) {
    int64_t eight;
    __builtin_memcpy(&eight, p, sizeof eight);
    return _mm256_set1_epi64x(eight);
  }
  static I shuffle_bytes(I a, I control) { return _mm256_shuffle_epi8(a, control); }
  static I abs_bytes(I a) { return _mm256_abs_epi8(a); }
  static I negative_bytes(I a) { return _mm256_cmpgt_epi8(_mm256_setzero_si256(), a); }
  static I dot_bytes(I a, I b) { return _mm256_maddubs_epi16(a, b); }
  static I dot16(I a, I b) { return _mm256_madd_epi16(a, b); }

  static F low(I pair, BFloat16) { return as_float(_mm256_slli_epi32(pair, 16)); }
  static F high(I pair, BFloat16) { return as_float(and_(pair, set1(0xffff0000u))); }
  static F low(I pair, Float16) { return _mm256_cvtph_ps(low_words(pair)); }
  static F high(I pair, Float16) { return _mm256_cvtph_ps(low_words(shift_right<16>(pair))); }
  static I pair(F low, F high, BFloat16) {
    return or_(shift_right<16>(round_to_bfloat16(low)),
               and_(round_to_bfloat16(high), set1(0xffff0000u)));
  }
  static I pair(F low, F high, Float16) {
    return or_(_mm256_cvtepu16_epi32(to_float16(low)),
               shift_left<16>(_mm256_cvtepu16_epi32(to_float16(high))));
  }

  static H bit_pairs(uint32_t word) {  // its sixteen two-bit fields, lowest first
    const I low = _mm256_srlv_epi32(set1(word), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const I high = _mm256_srlv_epi32(set1(word), _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30));
    const I packed = _mm256_packus_epi32(and_(low, set1(3u)), and_(high, set1(3u)));
    return _mm256_permute4x64_epi64(packed, 0xd8);  // the pack works within 128-bit halves
  }

  static F sum_lanes(const F (&a)[8]) {
    F b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
    // Each half holds a part of four sums.
    const F low = _mm256_hadd_ps(b[0], b[1]), high = _mm256_hadd_ps(b[2], b[3]);
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

  static void transpose(const I (&a)[8], void* out, int64_t row_bytes) {
    const auto store_row = [&](int row, I words) {
      store_words(reinterpret_cast<uint32_t*>(static_cast<char*>(out) + row * row_bytes), words);
    };
    I b[8];
    // 4x4 transposes inside the 128-bit halves, then an exchange of the halves.
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      const I ab_low = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      const I ab_high = _mm256_unpackhi_epi32(a[i], a[i + 1]);
      const I cd_low = _mm256_unpacklo_epi32(a[i + 2], a[i + 3]);
      const I cd_high = _mm256_unpackhi_epi32(a[i + 2], a[i + 3]);
      b[i] = _mm256_unpacklo_epi64(ab_low, cd_low);
      b[i + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
      b[i + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
      b[i + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store_row(i, _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
      store_row(i + 4, _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
  }

 private:
  static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store16(void* p, __m128i a) { _mm_storeu_si128(static_cast<__m128i*>(p), a); }
  static __m128i low_words(I a) {
    const I picked = _mm256_shuffle_epi8(
        a, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                            0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(picked, 0x08));
  }
  static __m128i to_float16(F a) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static I round_to_bfloat16(F a) {  // in the upper half of each lane
    const I bits = as_int(a);
    const I odd = and_(shift_right<16>(bits), set1(1u));
    const I rounded = add(bits, add(set1(0x7fffu), odd));
    const I quiet = or_(bits, set1(0x400000u));
    const F nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return as_int(_mm256_blendv_ps(as_float(rounded), as_float(quiet), nan));
  }
};

}  // namespace
}  // namespace gossamer
