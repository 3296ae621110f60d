// bfloat16 by VDPBF16PS: a lane's two products of 16-bit pairs are added to its float32 sum, so a
// kept pair costs one instruction. Subnormals count as zero (the
// instruction's definition).
#include "common/simd_avx512.h"
#include "sparse24/gemm_kernels.h"

namespace gossamer::sparse24 {
namespace {

// A table over the nibble idx0 | idx1 << 2; the entries of illegal nibbles are never needed.
struct NibbleTable {
  alignas(64) uint32_t entry[16];
  Simd::I load() const { return Simd::load_words(entry); }
};

// The byte shuffle that picks the pair out of four columns of 16 bits.
constexpr NibbleTable pick_table() {
  NibbleTable table{};
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    table.entry[nibble] = 0x01000100u + (nibble & 3) * 0x0202u + (nibble >> 2) * 0x02020000u;
  }
  return table;
}
constexpr NibbleTable kPick = pick_table();

// Which of a group's rows of the panel holds the pair, in bytes.
constexpr NibbleTable pair_table(uint32_t row_bytes) {
  constexpr uint32_t kRow[4][4] = {{0, 0, 2, 3}, {0, 0, 4, 5}, {0, 0, 0, 1}, {0, 0, 0, 0}};
  NibbleTable table{};
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    table.entry[nibble] = kRow[nibble & 3][nibble >> 2] * row_bytes;
  }
  return table;
}
template <int RowBytes>
constexpr NibbleTable kPairRow = pair_table(RowBytes);

struct DotBF16 {
  using F = Simd::F;
  using I = Simd::I;
  using X = BFloat16;
  static constexpr int kSteps = kRecordGroups;
  static constexpr int kPairs = 6;  // of four columns
  static constexpr int kPanelRows = kPairs * kRecordGroups;

  // few_rows: the nibble becomes the byte shuffle that picks the pair out of the four columns.
  template <int Rows, int Regs, int Chains>
  static void multiply_group(const uint32_t* block, int g, const I (&indices)[Regs], const X* x,
                             F (&sum)[Rows][Regs][Chains]) {
    const I shuffle = _mm512_permutexvar_epi32(indices[0], kPick.load());
    const auto pair = (__m512bh)Simd::load_words(block + (1 + g) * kBlockN);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      int64_t four;  // of 16 bits, in every 64 bits of a register
      __builtin_memcpy(&four, x + 4 * row, sizeof four);
      const I columns = _mm512_set1_epi64(four);
      F& a = sum[row][0][g % Chains];
      a = _mm512_dpbf16_ps(a, pair, (__m512bh)_mm512_shuffle_epi8(columns, shuffle));
    }
  }

  // many_rows: the weights are read where they lie; the panel holds every pair of every group, in
  // the order of kPairRow.
  static constexpr int kWeightWords = (1 + kRecordGroups) * kBlockN;
  static const uint32_t* weights(const uint32_t* records, int64_t, uint32_t*) {
    return records + kBlockN;
  }
  template <int RowBytes>
  static Simd::H offsets(const uint32_t* indices, int64_t base) {
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(*indices)),
                                              _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const I pairs =
        _mm512_permutexvar_epi32(_mm512_zextsi256_si512(nibbles), kPairRow<RowBytes>.load());
    constexpr int kGroup = kPairs * RowBytes;
    const __m256i groups = _mm256_setr_epi32(0, kGroup, 2 * kGroup, 3 * kGroup, 4 * kGroup,
                                             5 * kGroup, 6 * kGroup, 7 * kGroup);
    const __m256i bases = _mm256_add_epi32(groups, _mm256_set1_epi32(static_cast<int>(base)));
    const __m256i rows = _mm256_add_epi32(_mm512_castsi512_si256(pairs), bases);
    return _mm256_zextsi128_si256(_mm256_cvtepi32_epi16(rows));
  }
  static F multiply(F weight, const char* x, F sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)Simd::as_int(weight),
                            (__m512bh)Simd::load_words(reinterpret_cast<const uint32_t*>(x)));
  }

  static void pack_record(const X* rows, int64_t stride, int64_t panel_stride, uint32_t* panel) {
    I columns[Simd::kLanes];  // two of them in a word
#pragma GCC unroll 16
    for (int i = 0; i < Simd::kLanes; ++i) {
      columns[i] = Simd::load_words(reinterpret_cast<const uint32_t*>(rows + i * stride));
    }
    alignas(64) uint32_t words[kRecordK / 2][Simd::kLanes];
    Simd::transpose(columns, words, sizeof words[0]);
    const I low_half = Simd::set1(0xffffu), high_half = Simd::set1(0xffff0000u);
    for (int g = 0; g < kRecordGroups; ++g, panel += kPairs * panel_stride) {
      const I x01 = Simd::load_words(words[2 * g]), x23 = Simd::load_words(words[2 * g + 1]);
      const I x0 = Simd::and_(x01, low_half), x1 = Simd::shift_right<16>(x01);
      const I over2 = Simd::shift_left<16>(x23), over3 = Simd::and_(x23, high_half);
      Simd::store_words(panel, x01);
      Simd::store_words(panel + panel_stride, x23);
      Simd::store_words(panel + 2 * panel_stride, Simd::or_(x0, over2));
      Simd::store_words(panel + 3 * panel_stride, Simd::or_(x0, over3));
      Simd::store_words(panel + 4 * panel_stride, Simd::or_(x1, over2));
      Simd::store_words(panel + 5 * panel_stride, Simd::or_(x1, over3));
    }
  }
};

}  // namespace

const Unit* unit_avx512_bf16(DType dtype) {
  if (dtype != DType::kBFloat16) return unit_avx512(dtype);
  return &Kernels<Simd, BFloat16, DotBF16>::unit;
}

}  // namespace gossamer::sparse24
