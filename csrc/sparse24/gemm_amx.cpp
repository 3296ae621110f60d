// many_rows by AMX: y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]), 16 rows of x and 16 outputs a tile.
//
//   A    16 rows of x, 32 columns of each              packed once a pass
//   B    those 32 columns of 16 outputs, two columns   the kept pairs, spread with zeros between
//        of an output in a 32-bit word
//   C += A B    float32
//
// The tile unit knows no sparsity: what is saved is memory, 9/16 of the bytes of a dense weight. It
// multiplies bfloat16 only. A wider type is a sum of bfloat16 terms, which is exact: float16 of two,
// float32 of three (8 bits of the significand each); their products, but for those of float32 below
// 2^-26 of the result, are the product.
//
//   32 outputs are expanded for the depth of a pass, into L1;
//   for each 32 rows: four tiles of C, two of A from L2, two of B from L1
//
// A NaN, an infinity or an overflow makes the sums it reaches non-finite here, but 0 * inf is NaN at
// a pruned position, too, and so are inf - inf between terms: run() says when it saw one.
#include "common/amx.h"

#include "common/ceil_div.h"
#include "common/simd_avx512.h"
#include "sparse24/gemm_ends.h"

namespace gossamer::sparse24 {
namespace {

using F = Simd::F;
using I = Simd::I;

// Where the bytes of a kept pair go, by its nibble idx0 | idx1 << 2: the pair of columns 0 and 1 and
// the pair of columns 2 and 3, as two byte shuffles of the word that holds both values. Bits 0 and 1
// of a byte name the source and bit 7 makes a zero in the first; turned right by four bits, the same
// word is the second.
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
  I first, second;
  explicit Spread(I indices) {
    const I control = _mm512_permutexvar_epi32(indices, Simd::load_words(kSpread.entry));
    first = in_lane(control);
    second = in_lane(_mm512_ror_epi32(control, 4));
  }
  void store(I pairs, char* row) const {
    Simd::store_words(reinterpret_cast<uint32_t*>(row), _mm512_shuffle_epi8(pairs, first));
    Simd::store_words(reinterpret_cast<uint32_t*>(row + Tiles::kRowBytes),
                      _mm512_shuffle_epi8(pairs, second));
  }

 private:
  static I in_lane(I control) {  // each word picks among its own four bytes of the 128-bit lane
    const I word = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    constexpr int kAndOr = 0xea;
    return _mm512_ternarylogic_epi32(control, Simd::set1(0x83838383u), word, kAndOr);
  }
};

// A float as the sum of `Terms` bfloat16 numbers, each in the upper half of its word.
template <int Terms>
void split(F value, I (&terms)[Terms]) {
  for (int t = 0; t < Terms - 1; ++t) {
    const I half_up = Simd::add(Simd::as_int(value), Simd::set1(0x8000u));
    terms[t] = Simd::and_(half_up, Simd::set1(0xffff0000u));
    value = Simd::sub(value, Simd::as_float(terms[t]));
  }
  terms[Terms - 1] = Simd::as_int(value);  // its lower half is zero
}

struct Product {
  int x, weight;  // terms
};

// What the kernel needs to know of a storage type: its terms, and which of their products count, in
// an order in which one factor is kept.
template <class T>
struct Terms;

template <>
struct Terms<BFloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kTerms = 1;
  static constexpr Product kProducts[] = {{0, 0}};
  static void pairs(const uint32_t* record, int group, I (&pair)[1]) {
    pair[0] = Simd::load_words(record + (1 + group) * kBlockN);
  }
  static void row(const BFloat16* columns, I (&out)[1]) {
    out[0] = Simd::load_words(reinterpret_cast<const uint32_t*>(columns));
  }
};

template <int Count>
struct SplitTerms {
  static constexpr int kTerms = Count;
  static void pair(F first, F second, I (&pair)[Count]) {
    I low[Count], high[Count];
    split(first, low);
    split(second, high);
    for (int t = 0; t < Count; ++t) pair[t] = Simd::or_(Simd::shift_right<16>(low[t]), high[t]);
  }
  template <class T>
  static void row(const T* columns, I (&out)[Count]) {
    alignas(64) static constexpr uint16_t kUpperHalves[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const I order = Simd::load_words(reinterpret_cast<const uint32_t*>(kUpperHalves));
    I left[Count], right[Count];
    split(Simd::load(columns), left);
    split(Simd::load(columns + Simd::kLanes), right);
    for (int t = 0; t < Count; ++t) out[t] = _mm512_permutex2var_epi16(left[t], order, right[t]);
  }
};

template <>
struct Terms<Float16> : SplitTerms<2> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr Product kProducts[] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};
  static void pairs(const uint32_t* record, int group, I (&out)[2]) {
    const I words = Simd::load_words(record + (1 + group) * kBlockN);
    pair(Simd::low(words, Float16{}), Simd::high(words, Float16{}), out);
  }
};

template <>
struct Terms<float> : SplitTerms<3> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr Product kProducts[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
  static void pairs(const uint32_t* record, int group, I (&out)[3]) {
    const auto* first = reinterpret_cast<const float*>(record + (1 + 2 * group) * kBlockN);
    pair(Simd::load(first), Simd::load(first + kBlockN), out);
  }
};

// GemmEnds asks for the element of a packed x; here it is x's own.
template <class T>
struct AsStored {
  using X = T;
};

template <class T>
struct TileGemm {
  using Ends = GemmEnds<Simd, T, AsStored<T>>;
  static constexpr int kTerms = Terms<T>::kTerms;
  static constexpr int kProducts = sizeof(Terms<T>::kProducts) / sizeof(Product);
  static constexpr TileTerms kTileTerms = tile_terms(Terms<T>::kDType);
  static_assert(kTileTerms.terms == kTerms && kTileTerms.products == kProducts);
  static constexpr int64_t kRecordBytes = kTerms * Tiles::kBytes;  // of A or B, expanded
  static constexpr int kRecordWords = Ends::kRecordWords;
  static constexpr int kTileFloats = Tiles::kBytes / 4;

  static void expand(const uint32_t* record, char* b) {
    I indices = Simd::load_words(record);
#pragma GCC unroll 8
    for (int g = 0; g < kRecordGroups; ++g) {
      I pairs[kTerms];
      Terms<T>::pairs(record, g, pairs);
      const Spread spread(indices);
#pragma GCC unroll 3
      for (int t = 0; t < kTerms; ++t) {
        spread.store(pairs[t], b + t * Tiles::kBytes + 2 * g * Tiles::kRowBytes);
      }
      indices = Simd::shift_right<4>(indices);
    }
  }

  // [pair of tiles][record][tile of 16 rows][term]: what a product reads lies together.
  static void pack(const XRows& x, int64_t begin, int64_t records, char* pass) {
    const int64_t tiles = ceil_div(x.rows, Tiles::kRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * Tiles::kRows;
      const int64_t of_pair = tile / 2 * 2 + 1 < tiles ? 2 : 1;
      char* packed = pass + (tile / 2 * 2 * records + tile % 2) * kRecordBytes;
      for (int64_t record = begin; record < begin + records;
           ++record, packed += of_pair * kRecordBytes) {
        const int64_t k = record * kRecordK;
        for (int i = 0; i < Tiles::kRows; ++i) {
          const T* columns = static_cast<const T*>(x.data) + (first + i) * x.stride + k;
          T padded[kRecordK];
          if (first + i >= x.rows || k + kRecordK > x.k) {
            Ends::fetch(x, first + i, k, padded);
            columns = padded;
          }
          I terms[kTerms];
          Terms<T>::row(columns, terms);
          for (int t = 0; t < kTerms; ++t) {
            Simd::store_words(reinterpret_cast<uint32_t*>(packed + t * Tiles::kBytes +
                                                          i * Tiles::kRowBytes),
                              terms[t]);
          }
        }
      }
    }
  }

  // C += A B of a record: 16 * RowTiles rows, 16 * Blocks outputs.
  template <int RowTiles, int Blocks>
  static void multiply_record(const char* a, const char* b) {
    constexpr int64_t kStride = Tiles::kRowBytes;
    Tiles::fence();
#pragma GCC unroll 6
    for (int p = 0; p < kProducts; ++p) {
      const Product now = Terms<T>::kProducts[p];
      const Product before = Terms<T>::kProducts[p == 0 ? 0 : p - 1];
      const bool load_a = p == 0 || now.x != before.x, load_b = p == 0 || now.weight != before.weight;
      const char* tile_a = a + now.x * Tiles::kBytes;
      const char* tile_b = b + now.weight * Tiles::kBytes;
      if (load_a) _tile_loadd(4, tile_a, kStride);
      if (load_b) _tile_loadd(6, tile_b, kStride);
      if (load_b && Blocks == 2) _tile_loadd(7, tile_b + kRecordBytes, kStride);
      if (load_a && RowTiles == 2) _tile_loadd(5, tile_a + kRecordBytes, kStride);
      _tile_dpbf16ps(0, 4, 6);
      if (Blocks == 2) _tile_dpbf16ps(1, 4, 7);
      if (RowTiles == 2) _tile_dpbf16ps(2, 5, 6);
      if (RowTiles == 2 && Blocks == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }

  // The sums of a task: [pair of blocks][tile of 16 rows][block][16][16].
  template <int RowTiles, int Blocks>
  static void load_sums(bool first_pass, const float* sums) {
    if (first_pass) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    _tile_loadd(0, sums, Tiles::kRowBytes);
    if (Blocks == 2) _tile_loadd(1, sums + kTileFloats, Tiles::kRowBytes);
    if (RowTiles == 2) _tile_loadd(2, sums + Blocks * kTileFloats, Tiles::kRowBytes);
    if (RowTiles == 2 && Blocks == 2) _tile_loadd(3, sums + 3 * kTileFloats, Tiles::kRowBytes);
  }
  template <int RowTiles, int Blocks>
  static void store_sums(float* sums) {
    _tile_stored(0, sums, Tiles::kRowBytes);
    if (Blocks == 2) _tile_stored(1, sums + kTileFloats, Tiles::kRowBytes);
    if (RowTiles == 2) _tile_stored(2, sums + Blocks * kTileFloats, Tiles::kRowBytes);
    if (RowTiles == 2 && Blocks == 2) _tile_stored(3, sums + 3 * kTileFloats, Tiles::kRowBytes);
    Tiles::fence();
  }

  struct Pass {
    int64_t records;
    const uint32_t* panels;  // of the first of its blocks
    int64_t panel_step;      // words from a block to the next one
    char* b;                 // [kDepth][block][term] tiles
    bool first;
  };
  // The depth of B in L1: half of it, for 32 outputs.
  static constexpr int64_t kDepth = kTileTerms.depth();

  template <int Blocks>
  static void expand_record(const Pass& pass, int64_t record, int64_t slot) {
    for (int block = 0; block < Blocks; ++block) {
      const uint32_t* words = pass.panels + block * pass.panel_step + record * kRecordWords;
      // Past the end of the 4 KiB page, where the hardware's own prefetch stops.
      for (int word = 0; word < kRecordWords; word += kBlockN) {
        __builtin_prefetch(words + 4096 / 4 + word, 0, 2);
      }
      expand(words, pass.b + (slot * Blocks + block) * kRecordBytes);
    }
  }

  // The first rows of a pass expand the weights one record ahead of the product, which leaves B for
  // all other rows; a pass deeper than B (it has no other rows) uses B as a ring.
  template <int RowTiles, int Blocks, bool kExpand>
  static void multiply(const Pass& pass, const char* a, float* sums) {
    load_sums<RowTiles, Blocks>(pass.first, sums);
    if (kExpand) expand_record<Blocks>(pass, 0, 0);
    int64_t slot = 0;
    for (int64_t record = 0; record < pass.records; ++record) {
      const int64_t next = slot + 1 == kDepth ? 0 : slot + 1;
      if (kExpand && record + 1 < pass.records) expand_record<Blocks>(pass, record + 1, next);
      multiply_record<RowTiles, Blocks>(a + record * RowTiles * kRecordBytes,
                                        pass.b + slot * Blocks * kRecordBytes);
      slot = next;
    }
    store_sums<RowTiles, Blocks>(sums);
  }
  template <int Blocks, bool kExpand>
  static void multiply_rows(int row_tiles, const Pass& pass, const char* a, float* sums) {
    if (row_tiles == 1) return multiply<1, Blocks, kExpand>(pass, a, sums);
    multiply<2, Blocks, kExpand>(pass, a, sums);
  }

  // Bias, activation and rounding of a tile of sums; whether all of them were finite.
  static bool finish(const Epilogue& e, int64_t rows, const float* sums) {
    float bias[kBlockN];
    Ends::load_bias(e, 0, bias);
    const F added = Simd::load(bias);
    constexpr int kNotFinite = 0x01 | 0x08 | 0x10 | 0x80;
    __mmask16 not_finite = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const F sum = Simd::load(sums + row * kBlockN);
      not_finite |= _mm512_fpclass_ps_mask(sum, kNotFinite);
      T* out = static_cast<T*>(e.out) + row * e.out_stride;
      const F y = Ends::activate(Simd::add(sum, added), e.activation);
      if (e.n >= kBlockN) {
        Simd::store(out, y);
      } else {
        T padded[kBlockN];
        Simd::store(padded, y);
        __builtin_memcpy(out, padded, e.n * sizeof(T));
      }
    }
    return not_finite == 0;
  }

  template <int Blocks>
  static bool run_blocks(const ManyRowsTask& task, int64_t block, const Pass& pass, bool last) {
    float* sums = task.sums + block * task.tile * kTileFloats;
    const auto* a = reinterpret_cast<const char*>(task.panel);
    bool finite = true;
    for (int tile = 0; tile < task.tile; tile += 2) {
      const int row_tiles = task.tile - tile < 2 ? 1 : 2;
      const char* rows = a + tile * pass.records * kRecordBytes;
      float* sums_of_rows = sums + tile * Blocks * kTileFloats;
      if (tile == 0) {
        multiply_rows<Blocks, true>(row_tiles, pass, rows, sums_of_rows);
      } else {
        multiply_rows<Blocks, false>(row_tiles, pass, rows, sums_of_rows);
      }
      for (int b = 0; last && b < Blocks; ++b) {
        for (int t = tile; t < tile + row_tiles; ++t) {
          Epilogue e = task.epilogue;
          const int64_t row = t * Tiles::kRows, output = (block + b) * kBlockN;
          e.bias = e.bias == nullptr ? nullptr : static_cast<const T*>(e.bias) + output;
          e.out = static_cast<T*>(e.out) + row * e.out_stride + output;
          e.n -= output;
          const int64_t left = task.x.rows - row;
          finite &= finish(e, left < Tiles::kRows ? left : Tiles::kRows,
                           sums + (t * Blocks + b) * kTileFloats);
        }
      }
    }
    return finite;
  }

  static bool run(const ManyRowsTask& task) {
    const Tiles tiles;
    alignas(64) char b[2 * kDepth * kRecordBytes];
    bool finite = true;
    for (int64_t begin = 0; begin < task.records; begin += task.records_per_pass) {
      const int64_t left = task.records - begin;
      const int64_t records = left < task.records_per_pass ? left : task.records_per_pass;
      const bool last = records == left;
      pack(task.x, begin, records, reinterpret_cast<char*>(task.panel));
      const int64_t panel_step = task.records * kRecordWords;
      for (int64_t block = 0; block < task.blocks; block += 2) {
        const uint32_t* panels = task.panels + block * panel_step + begin * kRecordWords;
        const Pass pass{records, panels, panel_step, b, begin == 0};
        finite &= block + 1 < task.blocks ? run_blocks<2>(task, block, pass, last)
                                          : run_blocks<1>(task, block, pass, last);
      }
    }
    return finite;
  }
};

template <class T>
const Unit* unit(const Unit* vectors) {
  static constexpr int kPanelRows = Terms<T>::kTerms * Tiles::kRowBytes / sizeof(uint32_t);
  static const Unit unit = {vectors->few_rows_element_bytes, kPanelRows, vectors->pack_few,
                            vectors->few_rows, TileGemm<T>::run};
  return &unit;
}

}  // namespace

const Unit* unit_amx_bf16(DType dtype) {
  const Unit* vectors = unit_avx512_bf16(dtype);
  switch (dtype) {
    case DType::kBFloat16: return unit<BFloat16>(vectors);
    case DType::kFloat16: return unit<Float16>(vectors);
    case DType::kFloat32: return unit<float>(vectors);
    default: return nullptr;
  }
}

}  // namespace gossamer::sparse24
