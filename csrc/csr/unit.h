#pragma once
// The border between csr.cpp, which cuts the products into tasks, and the units that run one task
// with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "common/epilogue.h"
#include "csr/csr.h"

namespace gossamer::csr {

// Rows of W whose sums are held at once, and floats past either end of them that may be touched.
constexpr int kBlockRows = 1024, kSumsPast = 2 * 16 * 256;

// Rows of x or dy, in the dtype of the weight.
struct Rows {
  const void* data;
  int64_t stride;  // between rows, in elements
  int64_t rows, columns;
};

// Rows [first, last) of W, at most kBlockRows, against few rows of x.
struct GatherTask {
  Pattern pattern;
  const void* values;
  int64_t first, last;
  const float* x;  // its rows of k floats, a 0 before each, `x_stride` apart
  int64_t x_stride;
  int tokens;
  Epilogue epilogue;
};

// Rows [first, last) of W against panels of x: [panel][k][tile], the rows of x along the last.
struct TokensTask {
  Pattern pattern;
  const void* values;
  int64_t first, last;
  const float* x;
  int tile, panels;
  int64_t tokens;
  int64_t width;  // columns of W to a pass, whose part of a panel stays in a cache
  float* sums;    // scratch: [panel][kBlockRows][tile], and kSumsPast behind
  Epilogue epilogue;
};

// The same of the gradient of values, against one panel of x and one of dy, [n][tile].
struct DvaluesTask {
  Pattern pattern;
  int64_t first, last;
  const float *x, *dy;
  int tile;
  int64_t width;
  bool add;      // to what other panels made
  float* sums;   // [nnz]
  void* values;  // rounded here, or null where there are panels to come
};

struct Unit {
  int lanes;
  int64_t most_gathered;  // rows of x
  int most_registers;     // of a tile, each of so many lanes
  void (*pack)(const Rows& x, int64_t begin, int64_t end, int tile, float* panel);
  void (*widen)(const void* from, int64_t count, float* to);
  void (*gather)(const GatherTask& task);
  void (*tokens)(const TokensTask& task);
  void (*dvalues)(const DvaluesTask& task);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);

}  // namespace gossamer::csr
