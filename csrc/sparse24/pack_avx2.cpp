// Dense <-> portable, eight weights (one index byte) at a time: the mask of the non-zeros looks up
// what is kept, one shuffle gathers or spreads it.
#include <immintrin.h>

#include "common/simd_avx2.h"
#include "sparse24/pack.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {
namespace {

// For each kept mask: `gather[i]` is the column of kept value i, `spread[c]` the kept value of
// column c, 0x80 where there is none (a shuffle by 0x80 gives zero).
struct Shuffles {
  uint8_t gather[256][8], spread[256][8];
};

constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (int mask = 0; mask < 256; ++mask) {
    int kept = 0;
    for (uint8_t column = 0; column < 8; ++column) {
      shuffles.spread[mask][column] = 0x80;
      if (!(mask >> column & 1)) continue;
      shuffles.spread[mask][column] = static_cast<uint8_t>(kept);
      shuffles.gather[mask][kept++] = column;
    }
    while (kept < 8) shuffles.gather[mask][kept++] = 0x80;
  }
  return shuffles;
}
constexpr Shuffles kShuffles = make_shuffles();

__m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// Byte positions -> the control of a shuffle of 16-bit words.
__m128i word_control(const uint8_t* positions) {
  const __m128i bytes = load8(positions);
  const __m128i doubled = _mm_add_epi8(_mm_and_si128(bytes, _mm_set1_epi8(0x7f)),
                                       _mm_and_si128(bytes, _mm_set1_epi8(0x7f)));
  const __m128i low = _mm_or_si128(doubled, _mm_and_si128(bytes, _mm_set1_epi8(-128)));
  return _mm_unpacklo_epi8(low, _mm_or_si128(low, _mm_set1_epi8(1)));
}

bool from_dense_32(const void* dense, int64_t bytes, void* values, uint8_t* indices) {
  const auto* columns = static_cast<const float*>(dense);
  auto* kept = static_cast<float*>(values);
  bool fits = true;
  for (int64_t b = 0; b < bytes; ++b) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + 8 * b));
    const __m256i is_zero =
        _mm256_cmpeq_epi32(_mm256_add_epi32(v, v), _mm256_setzero_si256());  // -0.0 too
    const int nonzero = ~_mm256_movemask_ps(_mm256_castsi256_ps(is_zero)) & 255;
    const uint8_t* positions = kShuffles.gather[kPackTables.kept_mask[nonzero]];
    const __m256i control = _mm256_cvtepu8_epi32(load8(positions));
    const __m256 present = _mm256_castsi256_ps(_mm256_andnot_si256(is_zero, v));
    const __m256 packed = _mm256_permutevar8x32_ps(present, control);
    _mm_storeu_ps(kept + 4 * b, _mm256_castps256_ps128(packed));
    indices[b] = kPackTables.index_byte[nonzero];
    fits &= kPackTables.fits[nonzero];
  }
  return fits;
}

bool from_dense_16(const void* dense, int64_t bytes, void* values, uint8_t* indices) {
  const auto* columns = static_cast<const uint16_t*>(dense);
  auto* kept = static_cast<uint16_t*>(values);
  bool fits = true;
  for (int64_t b = 0; b < bytes; ++b) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + 8 * b));
    const __m128i is_zero = _mm_cmpeq_epi16(_mm_add_epi16(v, v), _mm_setzero_si128());  // -0.0 too
    const int nonzero = ~_mm_movemask_epi8(_mm_packs_epi16(is_zero, is_zero)) & 255;
    const __m128i control = word_control(kShuffles.gather[kPackTables.kept_mask[nonzero]]);
    const __m128i packed = _mm_shuffle_epi8(_mm_andnot_si128(is_zero, v), control);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(kept + 4 * b), packed);
    indices[b] = kPackTables.index_byte[nonzero];
    fits &= kPackTables.fits[nonzero];
  }
  return fits;
}

void to_dense_32(const void* values, const uint8_t* indices, int64_t bytes, void* dense) {
  const auto* kept = static_cast<const float*>(values);
  auto* columns = static_cast<float*>(dense);
  for (int64_t b = 0; b < bytes; ++b) {
    const uint8_t* positions = kShuffles.spread[kPackTables.mask_of_index[indices[b]]];
    const __m256i control = _mm256_cvtepi8_epi32(load8(positions));
    const __m256 packed = _mm256_castps128_ps256(_mm_loadu_ps(kept + 4 * b));
    const __m256 spread = _mm256_permutevar8x32_ps(packed, control);
    const __m256 absent = _mm256_castsi256_ps(_mm256_srai_epi32(control, 31));
    _mm256_storeu_ps(columns + 8 * b, _mm256_andnot_ps(absent, spread));
  }
}

void to_dense_16(const void* values, const uint8_t* indices, int64_t bytes, void* dense) {
  const auto* kept = static_cast<const uint16_t*>(values);
  auto* columns = static_cast<uint16_t*>(dense);
  for (int64_t b = 0; b < bytes; ++b) {
    const __m128i control = word_control(kShuffles.spread[kPackTables.mask_of_index[indices[b]]]);
    const __m128i spread = _mm_shuffle_epi8(load8(kept + 4 * b), control);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + 8 * b), spread);
  }
}

void gather_32(const void* dense, const uint8_t* indices, int64_t bytes, void* values) {
  const auto* columns = static_cast<const float*>(dense);
  auto* kept = static_cast<float*>(values);
  for (int64_t b = 0; b < bytes; ++b) {
    const uint8_t* positions = kShuffles.gather[kPackTables.mask_of_index[indices[b]]];
    const __m256 packed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(columns + 8 * b),
                                                   _mm256_cvtepu8_epi32(load8(positions)));
    _mm_storeu_ps(kept + 4 * b, _mm256_castps256_ps128(packed));
  }
}

void gather_16(const void* dense, const uint8_t* indices, int64_t bytes, void* values) {
  const auto* columns = static_cast<const uint16_t*>(dense);
  auto* kept = static_cast<uint16_t*>(values);
  for (int64_t b = 0; b < bytes; ++b) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + 8 * b));
    const __m128i control = word_control(kShuffles.gather[kPackTables.mask_of_index[indices[b]]]);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(kept + 4 * b), _mm_shuffle_epi8(v, control));
  }
}

void side_by_side(const void* rows, int64_t row_bytes, int64_t words, uint32_t* panel) {
  for (int64_t word = 0; word < words; word += 8) {
    for (int row = 0; row < kBlockN; row += 8) {
      const char* first = static_cast<const char*>(rows) + row * row_bytes + 4 * word;
      __m256i a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i * row_bytes));
      Simd::transpose(a, panel + word * kBlockN + row, 4 * kBlockN);
    }
  }
}

}  // namespace

const PackRows pack_rows_avx2 = {from_dense_32, from_dense_16, to_dense_32, to_dense_16,
                                 gather_32,     gather_16,     side_by_side};

}  // namespace gossamer::sparse24
