#pragma once
// The border between products.cpp, which cuts the products into tasks, and the units that run one
// task with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "actsparse/actsparse.h"
#include "common/epilogue.h"

namespace gossamer::actsparse {

// Tokens that share one reading of the weights: a bit each of a word.
constexpr int64_t kMostTokens = 64;

// Up to kMostTokens tokens of x.
struct Tokens {
  const void* data;
  int64_t stride;  // between tokens, in elements
  int64_t count;
  double threshold;
};

// An input that at least one token of the tile has active, and which.
struct ActiveRow {
  int64_t k;
  uint64_t tokens;  // bit t: active in token t
};

struct LinearTask {
  const void* weight;  // [k, columns], from the task's first column on
  int64_t weight_stride;
  Tokens x;
  const ActiveRow* rows;  // k ascending
  int64_t row_count;
  int64_t columns;
  float* sums;  // scratch, sums_bytes() of it
  Epilogue epilogue;
};

struct OutputsTask {
  const void* weight;  // [n, k]
  int64_t weight_stride, k;
  const float* x;         // [tokens, k]
  const ActiveRow* rows;  // the outputs to compute, as ActiveRow::k, and for which tokens
  int64_t row_count;
  Epilogue epilogue;  // its out is the first token's row, at output 0
};

struct Unit {
  // Writes the active rows of `k` inputs from `first` on, and returns how many there are.
  int64_t (*find_active)(const Tokens& x, int64_t first, int64_t k, ActiveRow* rows);
  int64_t (*sums_bytes)(int64_t tokens, int64_t columns);
  void (*linear)(const LinearTask& task);
  void (*to_floats)(const Tokens& x, int64_t k, float* floats);
  void (*outputs)(const OutputsTask& task);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);
const Unit* unit_avx512_bf16(DType dtype);

}  // namespace gossamer::actsparse
