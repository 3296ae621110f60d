#pragma once
// The border between gemm.cpp, which cuts a GEMM into tasks, and the units that run one task with
// one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "common/epilogue.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

// The largest tiles there are kernels for, by the 32-bit lanes of a register: in rows of x, and in
// registers of rows. Sums and operands of a tile fit the 16 or 32 registers.
constexpr int max_few_rows(int lanes) { return lanes == 16 ? 16 : 4; }
constexpr int max_many_vectors(int lanes) { return lanes == 16 ? 12 : 10; }
constexpr int kMaxRecordsPerPass = 8;

// What a storage type is to a tile unit that multiplies bfloat16: a sum of so many bfloat16 terms,
// with so many products of terms in one of its own (gemm_amx.cpp).
struct TileTerms {
  int terms, products;
};
constexpr TileTerms tile_terms(DType dtype) {
  return dtype == DType::kBFloat16 ? TileTerms{1, 1} : TileTerms{2, 4};
}
// Records of expanded weights: where they serve one tile or pair of tiles of x, a ring of so many;
// otherwise the depth of a pass, at most so many over the terms.
constexpr int kTileRing = 4, kTileDepth = 64;

// Rows of x, each contiguous, and where they end: rows and columns past the end read as zero.
struct XRows {
  const void* data;
  int64_t stride;  // between rows, in elements
  int64_t rows, k;
};

struct FewRowsTask {
  const uint32_t* panels;
  int64_t blocks, records;
  const void* x;  // tiles of `tile` rows: [tiles][records * 8 groups][tile][4 columns]
  int tile;
  int64_t rows;
  Epilogue epilogue;
};

struct ManyRowsTask {
  const uint32_t* panels;
  int64_t blocks, records, records_per_pass;
  bool spread_fetch;  // of the weights to come, over the outputs of a block
  XRows x;
  int tile;         // in registers of rows
  uint32_t* panel;  // scratch for a pass of x, words: records_per_pass * panel_rows * tile * lanes
  uint32_t* weights;  // scratch for expanded weights, words: records_per_pass * weight_words
  float* sums;        // scratch, floats: (blocks + 1) * 16 * tile * lanes
  Epilogue epilogue;
};

struct Unit {
  int64_t few_rows_element_bytes;  // of a packed x
  int64_t panel_rows;              // many_rows: words of a packed row of x a record
  int64_t weight_words;            // many_rows: of expanded weights a record
  void (*pack_few)(const XRows& x, int tile, void* packed);
  void (*few_rows)(const FewRowsTask& task);
  // False where the result is not to be trusted, and the target before this one has to do it all.
  bool (*many_rows)(const ManyRowsTask& task);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);
const Unit* unit_avx512_bf16(DType dtype);
const Unit* unit_amx_bf16(DType dtype);

}  // namespace gossamer::sparse24
