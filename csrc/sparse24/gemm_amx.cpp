// many_rows by AMX: y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]), 16 rows of x and 16 outputs a
// tile.
//
//   A    16 rows of x, 32 columns of each              packed once a pass
//   B    those 32 columns of 16 outputs, two columns   the kept pairs, spread with zeros between
//        of an output in a 32-bit word
//   C += A B    float32
//
// The tile unit knows no sparsity: what is saved is memory, 9/16 of the bytes of a dense weight. It
// multiplies bfloat16 only. A float16 is the sum of two bfloat16 terms, exactly, and four products
// of terms are its product. (float32, of three terms and six products, gained 5 to 15 % over the
// vector kernels in quiet, and lost half where another process used the same tile unit.)
//
//   32 outputs are expanded for the depth of a pass, into L2, together with the first rows'
//   product; for each 32 rows: four tiles of C, over the whole depth; two of A and two of B from
//   L2. Meanwhile the sums of the rows before get their bias and activation and are written.
//
// Single rows of tiles take 64 outputs: four chains of products, whose latency is 52 cycles.
//
// A sum that is not finite may be of this kernel's own making: the zeros between the kept weights
// make 0 * inf = NaN, and terms inf - inf. Then run() is false, and the vector kernels compute it
// all.
#include "common/amx.h"
#include "common/ceil_div.h"
#include "common/simd_avx512.h"
#include "sparse24/gemm_amx_spread.h"
#include "sparse24/gemm_ends.h"

namespace gossamer::sparse24 {
namespace {

using F = Simd::F;
using I = Simd::I;

// A float16 as the sum of two bfloat16 numbers, each in the upper half of its word.
void split(F value, I (&terms)[2]) {
  const I half_up = Simd::add(Simd::as_int(value), Simd::set1(0x8000u));
  terms[0] = Simd::and_(half_up, Simd::set1(0xffff0000u));
  terms[1] = Simd::as_int(Simd::sub(value, Simd::as_float(terms[0])));
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

template <>
struct Terms<Float16> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr int kTerms = 2;
  static constexpr Product kProducts[] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};
  static void pairs(const uint32_t* record, int group, I (&pair)[2]) {
    const I words = Simd::load_words(record + (1 + group) * kBlockN);
    I low[2], high[2];
    split(Simd::low(words, Float16{}), low);
    split(Simd::high(words, Float16{}), high);
    for (int t = 0; t < 2; ++t) pair[t] = Simd::or_(Simd::shift_right<16>(low[t]), high[t]);
  }
  static void row(const Float16* columns, I (&out)[2]) {
    alignas(64) static constexpr uint16_t kUpperHalves[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const I order = Simd::load_words(reinterpret_cast<const uint32_t*>(kUpperHalves));
    I left[2], right[2];
    split(Simd::load(columns), left);
    split(Simd::load(columns + Simd::kLanes), right);
    for (int t = 0; t < 2; ++t) out[t] = _mm512_permutex2var_epi16(left[t], order, right[t]);
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
  static_assert(tile_terms(Terms<T>::kDType).terms == kTerms);
  static_assert(tile_terms(Terms<T>::kDType).products == kProducts);
  static constexpr int64_t kRecordBytes = kTerms * Tiles::kBytes;  // of A or B, expanded
  static constexpr int kRecordWords = Ends::kRecordWords;
  static constexpr int kTileFloats = Tiles::kBytes / 4;
  static constexpr int kPanelRows = kTerms * Tiles::kRowBytes / 4;
  static constexpr int kWeightWords = 4 * kRecordBytes / 4;  // of four blocks

  // The bytes of a tile, or of as many as a type has terms, follow each other.
  static void expand(const uint32_t* record, char* b) {
    I indices = Simd::load_words(record);
#pragma GCC unroll 8
    for (int g = 0; g < kRecordGroups; ++g) {
      I pairs[kTerms];
      Terms<T>::pairs(record, g, pairs);
      const Spread spread(indices);
#pragma GCC unroll 2
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
            auto* row = packed + t * Tiles::kBytes + i * Tiles::kRowBytes;
            Simd::store_words(reinterpret_cast<uint32_t*>(row), terms[t]);
          }
        }
      }
    }
  }

  // A product takes 16 * RowTiles rows and 16 * Blocks outputs, at most four tiles of C: numbers 0
  // to 3, row by row.

  // C += A B of a record.
  template <int RowTiles, int Blocks>
  static void multiply_record(const char* a, const char* b) {
    static_assert(RowTiles * Blocks <= 4 && (RowTiles == 1 || Blocks <= 2));
    constexpr int64_t kStride = Tiles::kRowBytes;
    Tiles::fence();
#pragma GCC unroll 4
    for (int p = 0; p < kProducts; ++p) {
      const Product now = Terms<T>::kProducts[p];
      const Product before = Terms<T>::kProducts[p == 0 ? 0 : p - 1];
      const bool load_a = p == 0 || now.x != before.x,
                 load_b = p == 0 || now.weight != before.weight;
      const char* tile_a = a + now.x * Tiles::kBytes;
      const char* tile_b = b + now.weight * Tiles::kBytes;
      if (load_a) _tile_loadd(4, tile_a, kStride);
      if (load_b || Blocks == 4) _tile_loadd(6, tile_b, kStride);
      if (load_b && Blocks > 1) _tile_loadd(7, tile_b + kRecordBytes, kStride);
      if (load_a && RowTiles == 2) _tile_loadd(5, tile_a + kRecordBytes, kStride);
      _tile_dpbf16ps(0, 4, 6);
      if (Blocks > 1) _tile_dpbf16ps(1, 4, 7);
      if (RowTiles == 2 && Blocks == 1) _tile_dpbf16ps(1, 5, 6);
      if (RowTiles == 2 && Blocks == 2) _tile_dpbf16ps(2, 5, 6);
      if (RowTiles == 2 && Blocks == 2) _tile_dpbf16ps(3, 5, 7);
      if (Blocks == 4) {
        if (load_b) _tile_loadd(5, tile_b + 2 * kRecordBytes, kStride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, tile_b + 3 * kRecordBytes, kStride);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
  }

  template <int RowTiles, int Blocks>
  static void load_sums(bool first_pass, const float* sums) {
    constexpr int kCount = RowTiles * Blocks;
    if (first_pass) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    _tile_loadd(0, sums, Tiles::kRowBytes);
    if (kCount > 1) _tile_loadd(1, sums + kTileFloats, Tiles::kRowBytes);
    if (kCount > 2) _tile_loadd(2, sums + 2 * kTileFloats, Tiles::kRowBytes);
    if (kCount > 3) _tile_loadd(3, sums + 3 * kTileFloats, Tiles::kRowBytes);
  }
  template <int RowTiles, int Blocks>
  static void store_sums(float* sums) {
    constexpr int kCount = RowTiles * Blocks;
    _tile_stored(0, sums, Tiles::kRowBytes);
    if (kCount > 1) _tile_stored(1, sums + kTileFloats, Tiles::kRowBytes);
    if (kCount > 2) _tile_stored(2, sums + 2 * kTileFloats, Tiles::kRowBytes);
    if (kCount > 3) _tile_stored(3, sums + 3 * kTileFloats, Tiles::kRowBytes);
    Tiles::fence();
  }

  // Sums on their way out: bias, activation, rounding, a row of 16 * blocks outputs at a time.
  struct Outgoing {
    float sums[4 * kTileFloats];
    float bias[4 * kBlockN];
    Epilogue e;
    int64_t rows = 0, done = 0;
    int blocks = 0;
    F finite = Simd::zero();  // NaN in a lane where a sum was not

    void some_rows(int64_t count) {
      for (; count > 0 && done < rows; --count, ++done) {
        const float* tile = sums + done / Tiles::kRows * blocks * kTileFloats;
        const float* row = tile + done % Tiles::kRows * kBlockN;
        T* out = static_cast<T*>(e.out) + done * e.out_stride;
        int block = 0;
        for (; block + 1 < blocks && e.n >= (block + 2) * kBlockN; block += 2) {
          const F first = finished(row, block), second = finished(row, block + 1);
          store_pair(out + block * kBlockN, first, second);
        }
        for (; block < blocks && e.n > block * kBlockN; ++block) {
          T padded[2 * kBlockN];  // the same rounding in all places
          store_pair(padded, finished(row, block), Simd::zero());
          const int64_t left = e.n - block * kBlockN;
          __builtin_memcpy(out + block * kBlockN, padded,
                           (left < kBlockN ? left : kBlockN) * sizeof(T));
        }
      }
    }

   private:
    F finished(const float* row, int block) {
      const F sum = Simd::load(row + block * kTileFloats);
      finite = Simd::fma(sum, Simd::zero(), finite);
      return Ends::activate(Simd::add(sum, Simd::load(bias + block * kBlockN)), e.activation);
    }
    static void store_pair(BFloat16* out, F first, F second) {  // subnormals become zero
      Simd::store_words(reinterpret_cast<uint32_t*>(out), (I)_mm512_cvtne2ps_pbh(second, first));
    }
    template <class U>
    static void store_pair(U* out, F first, F second) {
      Simd::store(out, first);
      Simd::store(out + kBlockN, second);
    }
  };

  struct Pass {
    int64_t records;
    const uint32_t* panels;  // of the first of its blocks
    int64_t panel_step;      // words from a block to the next one
    char* b;                 // [depth][block][term] tiles
    int64_t depth;  // the first rows of a deeper pass, if it has no others, use B as a ring
    bool first, last;
  };

  template <int Blocks>
  static void expand_record(const Pass& pass, int64_t record, int64_t slot) {
#pragma GCC unroll 4
    for (int block = 0; block < Blocks; ++block) {
      const uint32_t* words = pass.panels + block * pass.panel_step + record * kRecordWords;
      // Past the end of the 4 KiB page, where the hardware's own prefetch stops.
      for (int word = 0; word < kRecordWords; word += kBlockN) {
        __builtin_prefetch(words + 4096 / 4 + word, 0, 2);
      }
      expand(words, pass.b + (slot * Blocks + block) * kRecordBytes);
    }
  }

  // The first rows of a pass expand the weights, two records ahead of the product.
  template <int RowTiles, int Blocks, bool kExpand>
  static void multiply(const Pass& pass, const char* a, float* sums, Outgoing& before) {
    constexpr int64_t kAhead = 2;
    const int64_t rows_a_record = ceil_div(before.rows, pass.records);
    load_sums<RowTiles, Blocks>(pass.first, sums);
    for (int64_t r = 0; kExpand && r < kAhead && r < pass.records; ++r) {
      expand_record<Blocks>(pass, r, r);
    }
    int64_t slot = 0;
    for (int64_t record = 0; record < pass.records; ++record) {
      if (kExpand && record + kAhead < pass.records) {
        const int64_t ahead = slot + kAhead;
        expand_record<Blocks>(pass, record + kAhead,
                              ahead < pass.depth ? ahead : ahead - pass.depth);
      }
      multiply_record<RowTiles, Blocks>(a + record * RowTiles * kRecordBytes,
                                        pass.b + slot * Blocks * kRecordBytes);
      before.some_rows(rows_a_record);
      slot = slot + 1 == pass.depth ? 0 : slot + 1;
    }
  }

  // All rows of the task and the outputs of `Blocks` blocks. Each product leaves the sums of its
  // last pass in one of two Outgoing, for the next one to write out.
  template <int Blocks, bool kOneTile>
  static void run_blocks(const ManyRowsTask& task, int64_t block, const Pass& pass,
                         Outgoing* (&outgoing)[2]) {
    constexpr int kTiles = kOneTile ? 1 : 2;
    const auto* a = reinterpret_cast<const char*>(task.panel);
    float* sums = task.sums + block * task.tile * kTileFloats;
    for (int tile = 0; tile < task.tile; tile += kTiles, sums += kTiles * Blocks * kTileFloats) {
      const int row_tiles = task.tile - tile < kTiles ? 1 : kTiles;
      const char* rows = a + tile * pass.records * kRecordBytes;
      Outgoing& before = *outgoing[0];
      Outgoing& now = *outgoing[1];
      if (kOneTile) {
        multiply<1, Blocks, true>(pass, rows, sums, before);
        store_sums<1, Blocks>(pass.last ? now.sums : sums);
      } else if constexpr (Blocks <= 2) {
        if (tile == 0) {
          multiply<2, Blocks, true>(pass, rows, sums, before);
        } else if (row_tiles == 2) {
          multiply<2, Blocks, false>(pass, rows, sums, before);
        } else {
          multiply<1, Blocks, false>(pass, rows, sums, before);
        }
        float* to = pass.last ? now.sums : sums;
        row_tiles == 2 ? store_sums<2, Blocks>(to) : store_sums<1, Blocks>(to);
      }
      before.some_rows(before.rows);
      before.rows = 0;
      if (!pass.last) continue;
      const int64_t row = tile * Tiles::kRows, output = block * kBlockN;
      const int64_t left = task.x.rows - row, most = row_tiles * Tiles::kRows;
      now.e = task.epilogue;
      now.e.bias = now.e.bias == nullptr ? nullptr : static_cast<const T*>(now.e.bias) + output;
      now.e.out = static_cast<T*>(now.e.out) + row * now.e.out_stride + output;
      now.e.n -= output;
      now.rows = left < most ? left : most;
      now.done = 0;
      now.blocks = Blocks;
      Ends::load_bias(now.e, 0, now.bias);
      outgoing[0] = &now;
      outgoing[1] = &before;
    }
  }

  static bool run(const ManyRowsTask& task) {
    const Tiles tiles;
    Outgoing sums[2];
    Outgoing* outgoing[2] = {&sums[0], &sums[1]};
    for (int64_t begin = 0; begin < task.records; begin += task.records_per_pass) {
      const int64_t left = task.records - begin;
      const int64_t records = left < task.records_per_pass ? left : task.records_per_pass;
      pack(task.x, begin, records, reinterpret_cast<char*>(task.panel));
      const int64_t step = task.records * kRecordWords;
      Pass pass{records,
                task.panels + begin * kRecordWords,
                step,
                reinterpret_cast<char*>(task.weights),
                task.tile <= 2 ? kTileRing : records,
                begin == 0,
                records == left};
      int64_t block = 0;
      const auto blocks = [&](auto count, auto one_tile) {
        for (; block + count() <= task.blocks; block += count()) {
          run_blocks<count(), one_tile()>(task, block, pass, outgoing);
          pass.panels += count() * step;
        }
      };
      if (task.tile == 1) {
        if constexpr (kTerms == 1) blocks(Constant<4>{}, Constant<1>{});  // or B outgrows the L1
        blocks(Constant<2>{}, Constant<1>{});
        blocks(Constant<1>{}, Constant<1>{});
      } else {
        blocks(Constant<2>{}, Constant<0>{});
        blocks(Constant<1>{}, Constant<0>{});
      }
    }
    outgoing[0]->some_rows(outgoing[0]->rows);
    const F finite = Simd::add(sums[0].finite, sums[1].finite);
    return _mm512_cmp_ps_mask(finite, finite, _CMP_UNORD_Q) == 0;
  }

  template <int Value>
  struct Constant {  // std::integral_constant, in a unit without standard templates
    constexpr int operator()() const { return Value; }
  };
};

template <class T>
const Unit* unit(const Unit* vectors) {
  static const Unit unit = {vectors->few_rows_element_bytes,
                            TileGemm<T>::kPanelRows,
                            TileGemm<T>::kWeightWords,
                            vectors->pack_few,
                            vectors->few_rows,
                            TileGemm<T>::run};
  return &unit;
}

}  // namespace

const Unit* unit_amx_bf16(DType dtype) {
  const Unit* vectors = unit_avx512_bf16(dtype);
  switch (dtype) {
    case DType::kBFloat16: return unit<BFloat16>(vectors);
    case DType::kFloat16: return unit<Float16>(vectors);
    default: return vectors;
  }
}

}  // namespace gossamer::sparse24
