#pragma once
// A kept pair of 16-bit values among the four columns of its group, for the tile unit. Included by
// its units only.
#include "common/amx.h"
#include "common/simd_avx512.h"

namespace gossamer::sparse24 {
namespace {

// Where the bytes of a kept pair go, by its nibble idx0 | idx1 << 2: the pair of columns 0 and 1
// and the pair of columns 2 and 3, as two byte shuffles of the word that holds both values. Bits 0
// and 1 of a byte name the source and bit 7 makes a zero in the first; turned right by four bits,
// the same word is the second.
struct SpreadTable {
  alignas(64) uint32_t entry[16];
};
constexpr SpreadTable spread_table() {
  SpreadTable table{};
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    const uint32_t column[2] = {nibble & 3, nibble >> 2};
    uint32_t control[2] = {0x80808080u, 0x80808080u};
    for (uint32_t slot = 0; slot < 2; ++slot) {
      const uint32_t shift = column[slot] % 2 * 16;
      uint32_t& c = control[column[slot] / 2];
      c = (c & ~(0xffffu << shift)) | (((2 * slot + 1) << 8 | 2 * slot) << shift);
    }
    table.entry[nibble] = control[0] | (control[1] << 4 | control[1] >> 28);
  }
  return table;
}
constexpr SpreadTable kSpread = spread_table();

// Two rows of B from the pairs of a group.
struct Spread {
  Simd::I first, second;
  explicit Spread(Simd::I indices) {
    const Simd::I control = _mm512_permutexvar_epi32(indices, Simd::load_words(kSpread.entry));
    first = in_lane(control);
    second = in_lane(_mm512_ror_epi32(control, 4));
  }
  void store(Simd::I pairs, char* row) const {
    Simd::store_words(reinterpret_cast<uint32_t*>(row), _mm512_shuffle_epi8(pairs, first));
    Simd::store_words(reinterpret_cast<uint32_t*>(row + Tiles::kRowBytes),
                      _mm512_shuffle_epi8(pairs, second));
  }

 private:
  static Simd::I in_lane(
      Simd::I control) {  // each word picks among its own four bytes of the 128-bit lane
    const Simd::I word =
        _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    constexpr int kAndOr = 0xea;
    return _mm512_ternarylogic_epi32(control, Simd::set1(0x83838383u), word, kAndOr);
  }
};

}  // namespace
}  // namespace gossamer::sparse24
