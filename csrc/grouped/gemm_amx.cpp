// tiles: bfloat16 by AMX, C[output][token] += A[output][pair of k] B[pair of k][token].
//
//   A   16 rows of W, 32 columns of them, where they lie
//   B   16 tokens, packed: [step of 32 columns][pair of columns][token][2]
//   C   sums of 16 outputs x 16 tokens
//
// Subnormals count as zero (the instruction's definition).
#include "common/amx.h"
#include "common/simd_avx512.h"
#include "common/simd_finish.h"
#include "grouped/gemm_unit.h"

namespace gossamer::grouped {
namespace {

struct TileGemm {
  using T = BFloat16;
  using Ends = Finish<Simd, T>;
  static constexpr int kTokens = Tiles::kRows, kOutputs = 2 * Tiles::kRows;  // 2: tiles of A
  static constexpr int kColumns = Tiles::kRowBytes / sizeof(T);

  static void pack(const XRows& x, int, void* packed) {
    char* to = static_cast<char*>(packed);
    for (int64_t first = 0; first < x.rows; first += kTokens) {
      for (int64_t k = 0; k < x.k; k += kColumns, to += Tiles::kBytes) {
        Simd::I pairs[kTokens];
        for (int t = 0; t < kTokens; ++t) {
          alignas(64) T padded[kColumns] = {};
          if (first + t < x.rows) {
            const T* from = static_cast<const T*>(x.data) + (first + t) * x.stride + k;
            const int64_t columns = x.k - k < kColumns ? x.k - k : kColumns;
            __builtin_memcpy(padded, from, columns * sizeof(T));
          }
          pairs[t] = Simd::load_words(reinterpret_cast<const uint32_t*>(padded));
        }
        Simd::transpose(pairs, to, Tiles::kRowBytes);
      }
    }
  }

  // Two tiles of rows of W, `outputs` of the rows being there.
  struct Rows {
    const char* first;
    int64_t row_bytes, steps, rest;  // whole steps, and columns after them
    int64_t outputs;
    alignas(64) T padded[kOutputs][kColumns];

    // Zeros where W has no row or no column: what lies there may be no number.
    void pad(int64_t step) {
      __builtin_memset(padded, 0, sizeof padded);
      const int64_t bytes = step < steps ? Tiles::kRowBytes : rest * int64_t{sizeof(T)};
      for (int64_t o = 0; o < outputs; ++o) {
        __builtin_memcpy(padded[o], first + o * row_bytes + step * Tiles::kRowBytes, bytes);
      }
      Tiles::fence();
    }
  };

  template <int TokenTiles>
  static void step(const char* a, int64_t a_stride, const char* b, int64_t b_tile) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(5, a + Tiles::kRows * a_stride, a_stride);
    _tile_loadd(6, b, Tiles::kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (TokenTiles == 2) {
      _tile_loadd(7, b + b_tile, Tiles::kRowBytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // sums[output][token], `sums_stride` tokens apart.
  template <int TokenTiles>
  static void multiply(Rows& rows, const char* b, int64_t b_tile, Share fetch, float* sums,
                       int64_t sums_stride) {
    Tiles::fence();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TokenTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < rows.steps + (rows.rest > 0); ++s, b += Tiles::kBytes) {
      if (s < rows.steps && rows.outputs == kOutputs) {
        const char* a = rows.first + s * Tiles::kRowBytes;
        if (fetch.has(
                s)) {  // of the rows after these: too many streams for the hardware's prefetch
          for (int o = 0; o < kOutputs; ++o) {
            __builtin_prefetch(a + (kOutputs + o) * rows.row_bytes, 0, 2);
          }
        }
        step<TokenTiles>(a, rows.row_bytes, b, b_tile);
      } else {
        rows.pad(s);
        step<TokenTiles>(reinterpret_cast<const char*>(rows.padded), Tiles::kRowBytes, b, b_tile);
      }
    }
    const int64_t bytes = sums_stride * int64_t{sizeof(float)};
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + Tiles::kRows * sums_stride, bytes);
    if constexpr (TokenTiles == 2) {
      _tile_stored(2, sums + kTokens, bytes);
      _tile_stored(3, sums + kTokens + Tiles::kRows * sums_stride, bytes);
    }
    Tiles::fence();
  }

  static void run(const Task& task) {
    const Tiles tiles;
    const auto* weights = static_cast<const char*>(task.weights);
    const int64_t row_bytes = task.k * int64_t{sizeof(T)};
    const int64_t b_tile = (task.k + kColumns - 1) / kColumns * Tiles::kBytes;
    const int64_t stride = (task.rows + kTokens - 1) / kTokens * kTokens;
    const int64_t pairs = (task.rows + 2 * kTokens - 1) / (2 * kTokens);
    Rows rows;
    rows.row_bytes = row_bytes;
    rows.steps = task.k / kColumns;
    rows.rest = task.k % kColumns;
    for (int64_t first = 0; first < task.outputs; first += kOutputs) {
      rows.first = weights + first * row_bytes;
      rows.outputs = task.outputs - first < kOutputs ? task.outputs - first : kOutputs;
      const char* b = static_cast<const char*>(task.x);
      for (int64_t row = 0; row < task.rows; row += 2 * kTokens, b += 2 * b_tile) {
        const bool two = task.rows - row > kTokens;
        const Share fetch(row / (2 * kTokens), pairs, rows.steps);
        (two ? multiply<2> : multiply<1>)(rows, b, b_tile, fetch, task.sums + row, stride);
      }
      Epilogue e = task.epilogue;
      if (e.bias != nullptr) e.bias = static_cast<const T*>(e.bias) + first;
      e.out = static_cast<T*>(e.out) + first;
      e.n = rows.outputs;
      Ends::all(e, task.sums, stride, task.rows, rows.outputs);
    }
  }

  static constexpr Unit unit = {
      .kernel = "tiles",
      .why = "16 outputs times 16 tokens an instruction",
      .max_tile = kTokens,
      .whole_tiles = true,
      .read_tokens = 64,  // measured on Emerald Rapids
      .step_columns = kColumns,
      .column_bytes = sizeof(T),
      .pack = pack,
      .run = run,
  };
};

}  // namespace

const Unit* unit_amx_bf16(DType dtype) {
  if (dtype != DType::kBFloat16) return unit_avx512_bf16(dtype);
  return &TileGemm::unit;
}

}  // namespace gossamer::grouped
