#pragma once
// Tables shared by the portable and the wide packing loops, and what a wide unit offers.
#include <cstdint>

namespace gossamer::sparse24 {

// Indexed by a byte: the mask of the non-zeros among eight weights (two groups), or an index byte.
struct PackTables {
  uint8_t kept_mask[256];      // that mask with each group filled up, or cut down, to two
  uint8_t index_byte[256];     // the index byte of kept_mask
  bool fits[256];              // no group holds more than two
  uint8_t mask_of_index[256];  // index byte -> kept mask; 0 where the byte is not legal
};
extern const PackTables kPackTables;

// One row, its first `bytes` index bytes (eight columns each). from_dense says whether all fit.
struct PackRows {
  bool (*from_dense_32)(const void* dense, int64_t bytes, void* values, uint8_t* indices);
  bool (*from_dense_16)(const void* dense, int64_t bytes, void* values, uint8_t* indices);
  void (*to_dense_32)(const void* values, const uint8_t* indices, int64_t bytes, void* dense);
  void (*to_dense_16)(const void* values, const uint8_t* indices, int64_t bytes, void* dense);
  void (*gather_32)(const void* dense, const uint8_t* indices, int64_t bytes, void* values);
  void (*gather_16)(const void* dense, const uint8_t* indices, int64_t bytes, void* values);
  // The first `words` (a multiple of 8) of kBlockN rows, word by word.
  void (*side_by_side)(const void* rows, int64_t row_bytes, int64_t words, uint32_t* panel);
};
extern const PackRows pack_rows_avx2;

}  // namespace gossamer::sparse24
