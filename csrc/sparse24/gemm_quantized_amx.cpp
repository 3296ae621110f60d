// 8-bit and 4-bit weights by AMX: 16 rows of x and 16 outputs a tile, which tiles of a Kind make:
//
//   Int8Tiles    int8 x int8, 64 columns a product, exact int32 sums
//   BF16Tiles    float8 x float8 or bfloat16 x 4-bit, 32 columns; both factors are bfloat16 exactly
//
//   A    16 rows of x                                  packed once
//   B    those columns of 16 outputs, in a 32-bit word  the kept pairs, spread with zeros between
//        those of an output that a product adds up
//   C += A B
//
// The tile unit knows no sparsity: a block of weights is expanded for its whole depth, into L2, by
// the first rows that it meets, and read from there by the others. Sums of 4-bit weights are scaled
// line by line.
//
// The zeros between the kept weights make 0 * inf = NaN: where a sum of floats is not finite, run()
// is false, and the vector kernels compute it all.
#include "sparse24/gemm_amx_spread.h"
#include "sparse24/gemm_quantized_kernels.h"

namespace gossamer::sparse24 {
namespace {

using F = Simd::F;
using I = Simd::I;

// Where the bytes of a kept pair go, by its nibble idx0 | idx1 << 2: a byte shuffle of the word
// whose two low bytes they are. Bit 7 makes a zero.
struct SpreadBytes {
  alignas(64) uint32_t entry[16];
};
constexpr SpreadBytes spread_bytes() {
  SpreadBytes table{};
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
constexpr SpreadBytes kSpreadBytes = spread_bytes();

struct Int8Tiles {
  using X = int8_t;
  using Packed = int8_t;
  static constexpr int kWords = 4;       // of values a row has in a record
  static constexpr int kGroupLines = 1;  // of B for a group of four columns
  static constexpr bool kScaled = false, kFloat = false;

  static void product(int c) {
    switch (c) {
      case 0: _tile_dpbssd(0, 4, 6); break;
      case 1: _tile_dpbssd(1, 5, 6); break;
      case 2: _tile_dpbssd(2, 4, 6); break;
      default: _tile_dpbssd(3, 5, 6); break;
    }
  }
  static F to_float(I sums) { return Simd::to_float(sums); }

  static void expand_group(const uint32_t* words, int group, I indices, char* to) {
    const I table = Simd::load_words(kSpreadBytes.entry);
    const I lane = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    const I four = Simd::load_words(words + (1 + group / 2) * kBlockN);
    const I pair = group % 2 == 0 ? four : Simd::shift_right<16>(four);
    const I control = Simd::or_(_mm512_permutexvar_epi32(indices, table), lane);
    Simd::store_words(reinterpret_cast<uint32_t*>(to), Simd::shuffle_bytes(pair, control));
  }

  static void fetch(const int8_t* from, const float*, int64_t count, int8_t* to) {
    __builtin_memcpy(to, from, count);
  }
};

// A table of sixteen 16-bit numbers, by the four low bits of each half of a lane.
struct Halves {
  alignas(64) uint16_t entry[32];
  I of(I indices) const {
    return _mm512_permutexvar_epi16(indices,
                                    Simd::load_words(reinterpret_cast<const uint32_t*>(entry)));
  }
};
constexpr Halves halves(float (*number)(int)) {
  Halves table{};
  for (int i = 0; i < 32; ++i) {
    table.entry[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, number(i % 16)) >> 16);
  }
  return table;
}
constexpr Halves kInt4 = halves([](int i) { return static_cast<float>(i < 8 ? i : i - 16); });
// Below 2^-6 float8 has steps of 2^-9.
constexpr Halves kSubnormalE4M3 = halves([](int i) { return 0x1p-9f * static_cast<float>(i); });

struct PairsInt4 {
  using X = BFloat16;
  static constexpr int kWords = 2;
  static constexpr bool kScaled = true;
  static I pairs(const uint32_t* words, int group) {
    const I word = Simd::load_words(words + (1 + group / 4) * kBlockN);
    const I low = group % 4 == 0   ? word
                  : group % 4 == 1 ? Simd::shift_right<8>(word)
                  : group % 4 == 2 ? Simd::shift_right<16>(word)
                                   : Simd::shift_right<24>(word);
    constexpr __mmask32 kUpper = 0xaaaaaaaau;
    const I both = _mm512_mask_blend_epi16(kUpper, low, Simd::shift_left<12>(low));
    return kInt4.of(both);
  }
  static void fetch(const BFloat16* from, const float*, int64_t count, BFloat16* to) {
    __builtin_memcpy(to, from, count * sizeof(BFloat16));
  }
};

struct PairsE4M3 {
  using X = E4M3;
  static constexpr int kWords = 4;
  static constexpr bool kScaled = false;
  static I pairs(const uint32_t* words, int group) {
    const I word = Simd::load_words(words + (1 + group / 2) * kBlockN);
    const I two =
        group % 2 == 0 ? Simd::and_(word, Simd::set1(0xffffu)) : Simd::shift_right<16>(word);
    const I both = Simd::or_(two, Simd::shift_left<8>(two));
    const I magnitude = Simd::and_(both, Simd::set1(0x007f007fu));
    const I sign = Simd::shift_left<8>(Simd::and_(both, Simd::set1(0x00800080u)));
    // Three bits of mantissa of seven, and a bias of 7 in place of 127.
    I number = Simd::add(Simd::shift_left<4>(magnitude), Simd::set1(0x3c003c00u));
    const __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    number = _mm512_mask_mov_epi16(number, subnormal, kSubnormalE4M3.of(magnitude));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    number = _mm512_mask_mov_epi16(number, nan, _mm512_set1_epi16(0x7fc0));
    return Simd::or_(number, sign);
  }
  static void fetch(const E4M3* from, const float* numbers, int64_t count, BFloat16* to) {
    for (int64_t i = 0; i < count; ++i) round_to(numbers[from[i].bits] / kE4M3Scale, to[i]);
  }
};

template <class Pairs>
struct BF16Tiles : Pairs {
  using Packed = BFloat16;
  static constexpr int kGroupLines = 2;
  static constexpr bool kFloat = true;

  static void product(int c) {
    switch (c) {
      case 0: _tile_dpbf16ps(0, 4, 6); break;
      case 1: _tile_dpbf16ps(1, 5, 6); break;
      case 2: _tile_dpbf16ps(2, 4, 6); break;
      default: _tile_dpbf16ps(3, 5, 6); break;
    }
  }
  static F to_float(I sums) { return Simd::as_float(sums); }

  static void expand_group(const uint32_t* words, int group, I indices, char* to) {
    Spread(indices).store(Pairs::pairs(words, group), to);
  }
};

template <class Kind>
struct TileRows {
  static constexpr int kRecordWords = (1 + Kind::kWords) * kBlockN;
  static constexpr int kRecordBytes = kRecordGroups * Kind::kGroupLines * Tiles::kRowBytes;  // of B
  static constexpr int kStepRecords = Tiles::kBytes / kRecordBytes;
  static constexpr int kStepColumns = kStepRecords * kRecordK;
  static constexpr int kMostTiles = 4;  // of C at a time
  static constexpr int kMostRows = kMostTiles * Tiles::kRows;

  // [tile of 16 rows][step][row][64 bytes]
  static void pack(const XRows& x, DType, const float* numbers, int, void* packed) {
    auto* to = static_cast<char*>(packed);
    for (int64_t first = 0; first < x.rows; first += Tiles::kRows) {
      for (int64_t k = 0; k < x.k; k += kStepColumns) {
        const int64_t left = x.k - k < kStepColumns ? x.k - k : kStepColumns;
        for (int64_t row = first; row < first + Tiles::kRows; ++row, to += Tiles::kRowBytes) {
          if (row >= x.rows || left < kStepColumns) __builtin_memset(to, 0, Tiles::kRowBytes);
          if (row >= x.rows) continue;
          const auto* from = static_cast<const typename Kind::X*>(x.data) + row * x.stride + k;
          Kind::fetch(from, numbers, left, reinterpret_cast<typename Kind::Packed*>(to));
        }
      }
    }
  }
  // A tile of B.
  static void expand_step(const QuantizedTask& task, int64_t step) {
    for (int64_t record = step * kStepRecords; record < (step + 1) * kStepRecords; ++record) {
      char* to = static_cast<char*>(task.scratch) + record * kRecordBytes;
      if (record == task.records) {
        __builtin_memset(to, 0, kRecordBytes);
        return;
      }
      const uint32_t* words = task.panels + record * kRecordWords;
      for (int word = 0; word < kRecordWords; word += kBlockN) {
        __builtin_prefetch(words + 4096 / 4 + word, 0, 3);  // as gemm_few_rows.h
      }
      I indices = Simd::load_words(words);
#pragma GCC unroll 8
      for (int group = 0; group < kRecordGroups; ++group) {
        Kind::expand_group(words, group, indices, to);
        to += Kind::kGroupLines * Tiles::kRowBytes;
        indices = Simd::shift_right<4>(indices);
      }
    }
  }

  // The sums of `Count` tiles of rows, whose packed rows are `x`. kExpand: B is made on the way.
  template <int Count, bool kExpand>
  static void multiply(const QuantizedTask& task, const char* x, float* totals) {
    constexpr int64_t kAhead = 2;
    const int64_t steps = (task.records + kStepRecords - 1) / kStepRecords;
    const int64_t span = Kind::kScaled ? task.scales.records : steps;
    const float* line = task.scales.lines;
    const int64_t tile = steps * Tiles::kBytes;
    const auto* b = static_cast<const char*>(task.scratch);
    for (int64_t step = 0; kExpand && step < kAhead && step < steps; ++step) {
      expand_step(task, step);
    }
    alignas(64) uint32_t sums[Count * Tiles::kRows][kBlockN];
    constexpr int kTile = Tiles::kRows;
    for (int64_t begin = 0; begin < steps; begin += span, line += kBlockN) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = begin; step < begin + span && step < steps; ++step) {
        if (kExpand && step + kAhead < steps) expand_step(task, step + kAhead);
        const char* a = x + step * Tiles::kBytes;
        Tiles::fence();
        _tile_loadd(6, b + step * Tiles::kBytes, Tiles::kRowBytes);
        _tile_loadd(4, a, Tiles::kRowBytes);
        Kind::product(0);
        if (Count > 1) _tile_loadd(5, a + tile, Tiles::kRowBytes);
        if (Count > 1) Kind::product(1);
        if (Count > 2) _tile_loadd(4, a + 2 * tile, Tiles::kRowBytes);
        if (Count > 2) Kind::product(2);
        if (Count > 3) _tile_loadd(5, a + 3 * tile, Tiles::kRowBytes);
        if (Count > 3) Kind::product(3);
      }
      _tile_stored(0, sums[0], Tiles::kRowBytes);
      if (Count > 1) _tile_stored(1, sums[kTile], Tiles::kRowBytes);
      if (Count > 2) _tile_stored(2, sums[2 * kTile], Tiles::kRowBytes);
      if (Count > 3) _tile_stored(3, sums[3 * kTile], Tiles::kRowBytes);
      Tiles::fence();
      const F scale = Kind::kScaled ? Simd::load(line) : Simd::set1(1.0f);
      for (int row = 0; row < Count * Tiles::kRows; ++row) {
        F total = Kind::to_float(Simd::load_words(sums[row]));
        if (Kind::kScaled) total = Simd::mul(total, scale);
        if (begin > 0) total = Simd::add(total, Simd::load(totals + row * kBlockN));
        Simd::store(totals + row * kBlockN, total);
      }
    }
  }
  template <int Count>
  static void multiply(const QuantizedTask& task, bool expand, const char* x, float* totals) {
    expand ? multiply<Count, true>(task, x, totals) : multiply<Count, false>(task, x, totals);
  }

  static bool run(const QuantizedTask& task) {
    const Tiles tiles;
    const int64_t steps = (task.records + kStepRecords - 1) / kStepRecords;
    F finite = Simd::zero();  // NaN in a lane where a sum was not
    for (int64_t row = 0; row < task.rows; row += kMostRows) {
      const char* x = static_cast<const char*>(task.x) + row * steps * Tiles::kRowBytes;
      alignas(64) float totals[kMostRows][kBlockN];
      const int64_t left = task.rows - row, rows = left < kMostRows ? left : kMostRows;
      switch ((rows + Tiles::kRows - 1) / Tiles::kRows) {
        case 1: multiply<1>(task, row == 0, x, totals[0]); break;
        case 2: multiply<2>(task, row == 0, x, totals[0]); break;
        case 3: multiply<3>(task, row == 0, x, totals[0]); break;
        default: multiply<4>(task, row == 0, x, totals[0]); break;
      }
      for (int64_t i = 0; Kind::kFloat && i < rows; ++i) {
        finite = Simd::fma(Simd::load(totals[i]), Simd::zero(), finite);
      }
      finish_rows<Simd>(task.ends, row, totals[0], rows);
    }
    return _mm512_cmp_ps_mask(finite, finite, _CMP_UNORD_Q) == 0;
  }

  static int tile_for(int64_t) { return Tiles::kRows; }

  static constexpr QuantizedUnit unit = {Tiles::kRows, Tiles::kRowBytes / kStepRecords,
                                         kStepRecords, kRecordBytes,
                                         tile_for,     pack,
                                         run,          nullptr,
                                         finish<Simd>};
};

}  // namespace

const QuantizedUnit* quantized_unit_amx(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return &TileRows<Int8Tiles>::unit;
    case DType::kE4M3: return &TileRows<BF16Tiles<PairsE4M3>>::unit;
    case DType::kUInt8: return &TileRows<BF16Tiles<PairsInt4>>::unit;
    default: return nullptr;
  }
}

}  // namespace gossamer::sparse24
