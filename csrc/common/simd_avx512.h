#pragma once
// One vocabulary of 32-bit-lane vector operations for every instruction set, so that a kernel is
// written once as a template over it. Included by units compiled for AVX-512 only; the unnamed
// namespace keeps each unit's copy its own (the linker could otherwise pick an AVX-512 body for a
// generic caller).
#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_offsets.h"

namespace gossamer {
namespace {

struct Simd : SimdOffsets {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // the second operand where either is NaN
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F negate(F a) { return _mm512_xor_ps(a, set1(-0.0f)); }
  static F abs(F a) { return _mm512_andnot_ps(set1(-0.0f), a); }
  static F where_negative(F sign, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(sign, zero(), _CMP_LT_OQ), no, yes);
  }
  // A bit for each lane of a that is above the limit, or where either is NaN.
  static uint32_t lanes_not_up_to(F a, F limit) {
    return _mm512_cmp_ps_mask(a, limit, _CMP_NLE_UQ);
  }

  static I set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I min_unsigned(I a, I b) { return _mm512_min_epu32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }  // of signed lanes
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int N>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, N);
  }
  template <int N>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, N);
  }
  // The number in the Which'th four bits of each lane, in two's complement.
  template <int Which>
  static F four_bit(I a) {
    const F numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(shift_right<4 * Which>(a), numbers);
  }
  static uint32_t above(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed, a bit a lane
  static I half(I a) { return _mm512_srai_epi32(a, 1); }  // of signed lanes, towards minus infinity
  static I round(F a) { return _mm512_cvtps_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p)), 16));
  }
  static F load(const Float16* p) { return _mm512_cvtph_ps(load16(p)); }
  static I load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static void store(BFloat16* p, F a) {
    store16(p, _mm512_cvtepi32_epi16(shift_right<16>(round_to_bfloat16(a))));
  }
  static void store(Float16* p, F a) { store16(p, to_float16(a)); }
  static void store_words(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static F broadcast(const uint32_t* p) {
    return as_float(_mm512_set1_epi32(static_cast<int>(*p)));
  }

  // Column numbers, and the floats that they name.
  static I load_index(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I load_index(const int16_t* p) { return _mm512_cvtepi16_epi32(load16(p)); }
  static I times(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F gather(const float* p, I index) { return _mm512_i32gather_ps(index, p, 4); }

  // Four floats in every 128 bits, and in each lane that of them which the index names by its two
  // low bits.
  static F broadcast4(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static F pick(F four, I index) { return _mm512_permutevar_ps(four, index); }

  // Eight bytes in every 64 bits, and what the control's bytes name of the 128 bits that each lies
  // in.
  static I broadcast8(const void* p) {
    int64_t eight;
    __builtin_memcpy(&eight, p, sizeof eight);
    return _mm512_set1_epi64(eight);
  }
  static I shuffle_bytes(I a, I control) { return _mm512_shuffle_epi8(a, control); }
  // Of signed bytes; ones where they are negative.
  static I abs_bytes(I a) { return _mm512_abs_epi8(a); }
  static I negative_bytes(I a) { return _mm512_movm_epi8(_mm512_movepi8_mask(a)); }
  // Pairs of unsigned bytes times signed ones as 16-bit numbers, which they have to fit; pairs of
  // those as 32-bit ones.
  static I dot_bytes(I a, I b) { return _mm512_maddubs_epi16(a, b); }
  static I dot16(I a, I b) { return _mm512_madd_epi16(a, b); }

  // The low and the high 16-bit float of each lane.
  static F low(I pair, BFloat16) { return as_float(_mm512_slli_epi32(pair, 16)); }
  static F high(I pair, BFloat16) { return as_float(and_(pair, set1(0xffff0000u))); }
  static F low(I pair, Float16) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair)); }
  static F high(I pair, Float16) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
  }
  static I pair(F low, F high, BFloat16) {
    return or_(shift_right<16>(round_to_bfloat16(low)),
               and_(round_to_bfloat16(high), set1(0xffff0000u)));
  }
  static I pair(F low, F high, Float16) {
    return or_(_mm512_cvtepu16_epi32(to_float16(low)),
               shift_left<16>(_mm512_cvtepu16_epi32(to_float16(high))));
  }

  static H bit_pairs(uint32_t word) {  // its sixteen two-bit fields, lowest first
    const I shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_cvtepi32_epi16(and_(_mm512_srlv_epi32(set1(word), shifts), set1(3u)));
  }

  // In lane i the sum of the lanes of a[i].
  static F sum_lanes(const F (&a)[16]) {
    F b[8], c[4];
    // Neighbours halve each other: sums of lanes of two registers side by side in one.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const I even = as_int(a[2 * i]), odd = as_int(a[2 * i + 1]);
      b[i] = add(as_float(_mm512_unpacklo_epi32(even, odd)),
                 as_float(_mm512_unpackhi_epi32(even, odd)));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I low = as_int(b[2 * i]), high = as_int(b[2 * i + 1]);
      c[i] = add(as_float(_mm512_unpacklo_epi64(low, high)),
                 as_float(_mm512_unpackhi_epi64(low, high)));
    }
    // Each quarter of c[i] holds a part of all four of its sums.
    const F c01 =
        add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
    const F c23 =
        add(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
    return add(_mm512_shuffle_f32x4(c01, c23, 0x88), _mm512_shuffle_f32x4(c01, c23, 0xdd));
  }

  // Writes the transpose of kLanes x kLanes words, its rows `row_bytes` apart.
  static void transpose(const I (&a)[16], void* out, int64_t row_bytes) {
    const auto store_row = [&](int row, I words) {
      store_words(reinterpret_cast<uint32_t*>(static_cast<char*>(out) + row * row_bytes), words);
    };
    I b[16];
    // 4x4 transposes inside the 128-bit quarters, then a 4x4 transpose of the quarters.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const I ab_low = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      const I ab_high = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      const I cd_low = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]);
      const I cd_high = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
      b[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
      b[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
      b[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
      b[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const I low02 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
      const I low13 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
      const I high02 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
      const I high13 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
      store_row(i, _mm512_shuffle_i32x4(low02, high02, 0x88));
      store_row(i + 4, _mm512_shuffle_i32x4(low13, high13, 0x88));
      store_row(i + 8, _mm512_shuffle_i32x4(low02, high02, 0xdd));
      store_row(i + 12, _mm512_shuffle_i32x4(low13, high13, 0xdd));
    }
  }

 private:
  static __m256i load16(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static void store16(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static __m256i to_float16(F a) {
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static I round_to_bfloat16(F a) {  // in the upper half of each lane
    const I bits = as_int(a);
    const I odd = and_(shift_right<16>(bits), set1(1u));
    const I rounded = add(bits, add(set1(0x7fffu), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, set1(0x400000u));
  }
};

}  // namespace
}  // namespace gossamer
