#pragma once
// The border between topk.cpp and topk_select.cpp, which split the work, and the units that do a
// part of it with one instruction set.
#include <cstdint>

#include "actsparse/topk.h"
#include "common/epilogue.h"

namespace gossamer::actsparse::topk {

constexpr int64_t kStripColumns = 2048;  // whose sums stay in the first-level cache
constexpr int64_t kSlice = 64;  // columns of a tile: whole registers of any instruction set

// Some rows of the matrix, kSlice columns of them side by side, and what the pairs of some bags
// add up to with them.
struct TileSums {
  const void* tile;       // [rows][kSlice]
  int64_t k;              // as in Bags,
  const int64_t* begins;  // of the first bag on
  const uint32_t* rows;   // of the tile
  const float* scales;
  int64_t bags;
  float* sums;  // [bags][kSlice]
  bool add;     // to what is in sums
};

struct Unit {
  // Columns from first to last of some bags. `sums` has room for kStripColumns and a register more.
  void (*sum)(const Bags& args, int64_t first_bag, int64_t last_bag, int64_t first, int64_t last,
              float* sums);
  void (*sum_tile)(const TileSums& task);
  // Sums of kSlice columns become out.
  void (*finish)(const Epilogue& epilogue, const float* sums, int64_t rows);
  // `x` is scratch of one token, rounded up to whole registers.
  void (*dot)(const Dots& args, int64_t first_token, int64_t last_token, float* x);
  // Appends to `found` the columns from `at` on whose entry is above the limit or no number, until
  // `room` may be short or the row ends, and moves `at` there.
  int64_t (*above)(const void* row, int64_t& at, int64_t width, float limit, uint32_t* found,
                   int64_t room);
  void (*widen)(const void* from, int64_t count, float* to);
};

constexpr int64_t kLeastRoom = 64;

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);
const Unit* unit_in_force(DType dtype);

}  // namespace gossamer::actsparse::topk
