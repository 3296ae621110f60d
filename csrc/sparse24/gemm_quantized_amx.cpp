// int8 by AMX: 16 rows of x and 16 outputs a tile.
//
//   A    16 rows of x, 64 columns of each              packed once
//   B    those columns of 16 outputs, a group of four   the kept pairs, spread with zeros between
//        columns of an output in a 32-bit word
//   C += A B    int32, exact
//
// The tile unit knows no sparsity: a block of weights is expanded for its whole depth, into L2, by
// the first rows that it meets, and read from there by the others.
#include "common/amx.h"
#include "common/simd_avx512.h"
#include "sparse24/gemm_quantized_kernels.h"

namespace gossamer::sparse24 {
namespace {

using I = Simd::I;

// Where the bytes of a kept pair go, by its nibble idx0 | idx1 << 2: a byte shuffle of the word
// whose two low bytes they are. Bit 7 makes a zero.
struct SpreadPair {
  alignas(64) uint32_t entry[16];
};
constexpr SpreadPair spread_pair() {
  SpreadPair table{};
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    uint32_t control = 0x80808080u;
    for (uint32_t slot = 0; slot < 2; ++slot) {
      const uint32_t shift = 8 * (nibble >> (2 * slot) & 3);
      control = (control & ~(0xffu << shift)) | slot << shift;
    }
    table.entry[nibble] = control;
  }
  return table;
}
constexpr SpreadPair kSpreadPair = spread_pair();

struct TileRows {
  static constexpr int kStepColumns = Tiles::kRowBytes;  // two records
  static constexpr int kRecordLines = 1 + kRecordK / kWordColumns;
  static constexpr int kRecordWords = kRecordLines * kBlockN;
  static constexpr int kRecordBytes = kRecordK * kBlockN;  // of B
  static constexpr int kMostTiles = 4;                     // of C at a time

  static int64_t steps(int64_t records) { return (records + 1) / 2; }

  // [tile of 16 rows][step][row][64 bytes]
  static void pack(const XRows& x, DType, const float*, int, void* packed) {
    auto* to = static_cast<int8_t*>(packed);
    for (int64_t first = 0; first < x.rows; first += Tiles::kRows) {
      for (int64_t k = 0; k < x.k; k += kStepColumns) {
        const int64_t left = x.k - k < kStepColumns ? x.k - k : kStepColumns;
        for (int64_t row = first; row < first + Tiles::kRows; ++row, to += kStepColumns) {
          const auto* from = static_cast<const int8_t*>(x.data) + row * x.stride + k;
          if (row < x.rows && left == kStepColumns) {
            __builtin_memcpy(to, from, kStepColumns);
          } else {
            __builtin_memset(to, 0, kStepColumns);
            if (row < x.rows) __builtin_memcpy(to, from, left);
          }
        }
      }
    }
  }

  // Half a tile of B.
  static void expand_record(const uint32_t* words, char* to) {
    const I table = Simd::load_words(kSpreadPair.entry);
    const I lane = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    I indices = Simd::load_words(words);
#pragma GCC unroll 8
    for (int group = 0; group < kRecordGroups; ++group, to += Tiles::kRowBytes) {
      const I four = Simd::load_words(words + (1 + group / 2) * kBlockN);
      const I pair = group % 2 == 0 ? four : Simd::shift_right<16>(four);
      const I control = Simd::or_(_mm512_permutexvar_epi32(indices, table), lane);
      Simd::store_words(reinterpret_cast<uint32_t*>(to), Simd::shuffle_bytes(pair, control));
      indices = Simd::shift_right<4>(indices);
    }
  }
  static void expand_step(const QuantizedTask& task, int64_t step) {
    for (int64_t record = 2 * step; record < 2 * step + 2; ++record) {
      char* to = static_cast<char*>(task.scratch) + record * kRecordBytes;
      if (record == task.records) {
        __builtin_memset(to, 0, kRecordBytes);
        return;
      }
      const uint32_t* words = task.panels + record * kRecordWords;
      for (int word = 0; word < kRecordWords; word += kBlockN) {
        __builtin_prefetch(words + 4096 / 4 + word, 0, 3);  // as gemm_few_rows.h
      }
      expand_record(words, to);
    }
  }

  // C of `Count` tiles of rows, whose packed rows are `x`. kExpand: B is made on the way.
  template <int Count, bool kExpand>
  static void multiply(const QuantizedTask& task, const char* x, int32_t* sums) {
    constexpr int64_t kAhead = 2;
    const int64_t steps = TileRows::steps(task.records), tile = steps * Tiles::kBytes;
    const auto* b = static_cast<const char*>(task.scratch);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; kExpand && step < kAhead && step < steps; ++step) {
      expand_step(task, step);
    }
    for (int64_t step = 0; step < steps; ++step) {
      if (kExpand && step + kAhead < steps) expand_step(task, step + kAhead);
      const char* a = x + step * Tiles::kBytes;
      Tiles::fence();
      _tile_loadd(6, b + step * Tiles::kBytes, Tiles::kRowBytes);
      _tile_loadd(4, a, Tiles::kRowBytes);
      _tile_dpbssd(0, 4, 6);
      if (Count > 1) {
        _tile_loadd(5, a + tile, Tiles::kRowBytes);
        _tile_dpbssd(1, 5, 6);
      }
      if (Count > 2) {
        _tile_loadd(4, a + 2 * tile, Tiles::kRowBytes);
        _tile_dpbssd(2, 4, 6);
      }
      if (Count > 3) {
        _tile_loadd(5, a + 3 * tile, Tiles::kRowBytes);
        _tile_dpbssd(3, 5, 6);
      }
    }
    constexpr int kTile = Tiles::kBytes / 4;
    _tile_stored(0, sums, Tiles::kRowBytes);
    if (Count > 1) _tile_stored(1, sums + kTile, Tiles::kRowBytes);
    if (Count > 2) _tile_stored(2, sums + 2 * kTile, Tiles::kRowBytes);
    if (Count > 3) _tile_stored(3, sums + 3 * kTile, Tiles::kRowBytes);
    Tiles::fence();
  }
  template <int Count>
  static void multiply(const QuantizedTask& task, bool expand, const char* x, int32_t* sums) {
    expand ? multiply<Count, true>(task, x, sums) : multiply<Count, false>(task, x, sums);
  }

  static void run(const QuantizedTask& task) {
    const Tiles tiles;
    const int64_t row_bytes = steps(task.records) * kStepColumns;
    for (int64_t row = 0; row < task.rows; row += kMostTiles * Tiles::kRows) {
      const char* x = static_cast<const char*>(task.x) + row * row_bytes;
      alignas(64) int32_t sums[kMostTiles * Tiles::kRows][kBlockN];
      const int64_t left = task.rows - row, most = kMostTiles * Tiles::kRows;
      const int64_t rows = left < most ? left : most;
      switch ((rows + Tiles::kRows - 1) / Tiles::kRows) {
        case 1: multiply<1>(task, row == 0, x, sums[0]); break;
        case 2: multiply<2>(task, row == 0, x, sums[0]); break;
        case 3: multiply<3>(task, row == 0, x, sums[0]); break;
        default: multiply<4>(task, row == 0, x, sums[0]); break;
      }
      alignas(64) float floats[kMostTiles * Tiles::kRows][kBlockN];
      for (int64_t i = 0; i < rows; ++i) {
        Simd::store(floats[i], Simd::to_float(_mm512_load_si512(sums[i])));
      }
      finish_rows<Simd>(task.ends, row, floats[0], rows);
    }
  }

  static int tile_for(int64_t) { return Tiles::kRows; }
};

constexpr QuantizedUnit kTileUnit = {Tiles::kRows,
                                     kRecordK,
                                     2,
                                     TileRows::kRecordBytes,
                                     TileRows::tile_for,
                                     TileRows::pack,
                                     TileRows::run,
                                     nullptr,
                                     finish<Simd>};

}  // namespace

const QuantizedUnit* quantized_unit_amx_int8() { return &kTileUnit; }

}  // namespace gossamer::sparse24
