#pragma once
// The border between gemm.cpp, which cuts the products into tasks, and the units that run one task
// with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "common/epilogue.h"
#include "grouped/grouped.h"

namespace gossamer::grouped {

// Outputs whose sums are gathered before they become y, and floats past them that may be read.
constexpr int kBlockN = 64, kSumsPast = 2 * 16 * kBlockN;

// Tokens of one expert.
struct XRows {
  const void* data;
  int64_t stride;  // between rows, in elements
  int64_t rows, k;
};

struct Task {
  const void* weights;  // rows of k, from the first output on
  int64_t outputs, k;
  const void* x;  // packed
  int tile;       // tokens
  int64_t rows;
  float* sums;  // scratch: kBlockN * rows rounded up to a tile, and kSumsPast
  Epilogue epilogue;
};

struct Unit {
  const char* kernel;
  const char* why;
  // x is packed in tiles of so many tokens, the last one filled up with zeros, and its columns
  // rounded up to a step.
  int max_tile;
  bool whole_tiles;  // of max_tile tokens always
  // What reading a weight from memory costs, in tokens that it is multiplied with.
  int64_t read_tokens;
  int64_t step_columns;  // of x
  int64_t column_bytes;  // of a packed token
  void (*pack)(const XRows& x, int tile, void* packed);
  void (*run)(const Task& task);
};

// The part of `steps` that is tile number `tile`'s of `tiles`. In the unnamed namespace: each unit
// has its own.
namespace {
struct Share {
  int64_t from, count;
  Share(int64_t tile, int64_t tiles, int64_t steps)
      : from(tile * steps / tiles), count((tile + 1) * steps / tiles - from) {}
  bool has(int64_t step) const {
    return static_cast<uint64_t>(step - from) < static_cast<uint64_t>(count);
  }
};
}  // namespace

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);
const Unit* unit_avx512_bf16(DType dtype);
const Unit* unit_amx_bf16(DType dtype);

}  // namespace gossamer::grouped
