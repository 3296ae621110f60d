// bfloat16 by VDPBF16PS, two active rows of a token at once, for several tokens: the products are
// exact and are added in the order of the rows, as elsewhere. Subnormals count as zero, and sums
// that would be subnormal become zero (the instruction's definition).
//
//   row 3   a0 a1 a2 ...     interleaved     a0 b0 | a1 b1 | ...   a lane has both of a column
//   row 7   b0 b1 b2 ...     with x[7], x[3] in every lane
#include "actsparse/kernels.h"
#include "common/simd_avx512.h"

namespace gossamer::actsparse {
namespace {

struct Pairs {
  static constexpr int kBatch = Share::kMost;
  static constexpr int64_t kColumns = 256;
  static constexpr int kStep = 32;  // columns of a register
  static constexpr int kMost = 4;   // pairs at once
  // Of a row. Interleaving anew at each use costs more than converting once, from then on (measured
  // on Emerald Rapids).
  static constexpr int64_t kMostUses = 3;
  using I = Simd::I;

  const BFloat16* rows[kBatch];  // strips of them are in the first-level cache after the first use

  void take(int row, const BFloat16* from, int64_t) { rows[row] = from; }

  static I load(const BFloat16* p, int64_t count) {
    if (count >= kStep) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p);
  }

  // The instruction adds the product of the upper halves first. Quarters of the two registers of
  // sums take turns: columns 0 to 3, 8 to 11, ... are in the first.
  template <int Count>
  static void add_pairs(const BFloat16* const* rows, const uint32_t* x, float* y, int64_t columns) {
    I factor[Count];
#pragma GCC unroll 4
    for (int p = 0; p < Count; ++p) factor[p] = Simd::set1(x[p]);
    for (int64_t c = 0; c < columns; c += kStep) {
      __m512 low = _mm512_loadu_ps(y + c), high = _mm512_loadu_ps(y + c + 16);
#pragma GCC unroll 4
      for (int p = 0; p < Count; ++p) {
        const I first = load(rows[2 * p] + c, columns - c);
        const I second = load(rows[2 * p + 1] + c, columns - c);
        low = _mm512_dpbf16_ps(low, (__m512bh)_mm512_unpacklo_epi16(second, first),
                               (__m512bh)factor[p]);
        high = _mm512_dpbf16_ps(high, (__m512bh)_mm512_unpackhi_epi16(second, first),
                                (__m512bh)factor[p]);
      }
      _mm512_storeu_ps(y + c, low);
      _mm512_storeu_ps(y + c + 16, high);
    }
  }
  template <int Count = kMost>
  static void add_up_to(int count, const BFloat16* const* rows, const uint32_t* x, float* y,
                        int64_t columns) {
    if (count == Count) return add_pairs<Count>(rows, x, y, columns);
    if constexpr (Count > 1) add_up_to<Count - 1>(count, rows, x, y, columns);
  }

  void add(const Share& share, float* y, int64_t columns) const {
    // A lone row is paired with zeros: not with any row, whose infinity times 0 is NaN.
    alignas(64) static const BFloat16 zeros[kColumns] = {};
    for (int i = 0; i < share.count; i += 2 * kMost) {
      const int left = share.count - i, count = left < 2 * kMost ? (left + 1) / 2 : kMost;
      const BFloat16* of_token[2 * kMost];
      uint32_t x[kMost];
      for (int p = 0; p < count; ++p) {
        const int first = i + 2 * p, second = first + 1;
        const bool lone = second == share.count;
        of_token[2 * p] = rows[share.row[first]];
        of_token[2 * p + 1] = lone ? zeros : rows[share.row[second]];
        x[p] = bits_of(share.x[first]) | (lone ? 0 : bits_of(share.x[second]) >> 16);
      }
      add_up_to(count, of_token, x, y, columns);
    }
  }

  static uint32_t bits_of(float x) {  // a bfloat16, in the upper half
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
  }

  static void put_in_order(float* y, int64_t columns) {
    const I first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const I second = Simd::add(first, Simd::set1(8u));
    for (int64_t c = 0; c < columns; c += kStep) {
      const __m512 low = _mm512_loadu_ps(y + c), high = _mm512_loadu_ps(y + c + 16);
      _mm512_storeu_ps(y + c, _mm512_permutex2var_ps(low, first, high));
      _mm512_storeu_ps(y + c + 16, _mm512_permutex2var_ps(low, second, high));
    }
  }
};

}  // namespace

const Unit* unit_avx512_bf16(DType dtype) {
  if (dtype != DType::kBFloat16) return unit_avx512(dtype);
  return &Kernels<Simd, BFloat16, Pairs>::unit;
}

}  // namespace gossamer::actsparse
