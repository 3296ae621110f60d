#pragma once
// The border between conv.cpp, which cuts a convolution into tasks, and the units that run parts of
// one with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "common/conv_shape.h"
#include "common/dtype.h"
#include "common/epilogue.h"

namespace gossamer::blocksparse {

// Output pixels a unit works on at once, in registers, and outputs a batch gathers before it writes
// them: a square of a 16-bit type.
constexpr int kTileVectors = 12, kBatchOutputs = 32;

// Consecutive output pixels of one image and depth: whole rows, or a part of one.
struct Strip {
  int64_t image, depth;
  int64_t row, rows;      // of y
  int64_t column, width;  // of y; the whole width where there are several rows
};

// The part of x that a strip sees, as float32 with the pixels of a channel side by side: what a
// register of outputs reads for one weight is then consecutive. One plane for each (tap along d,
// row phase, tap along w) that the kernel has, [channels][plane rows][strip width]: stride and
// padding along w are in it, and a tap along h is a shift by whole rows.
//
//   output q of the strip under tap (kd, kh, kw), channel c:
//     plane(kd, kh * dilation % stride, kw)[c][q + kh * dilation / stride * width]
struct Panel {
  int64_t first_channel, channels;
  int64_t plane_rows;
  int64_t channel_stride;  // floats; a little more than the rows, for the last register of a shift
  int64_t plane_stride;
  float* data;
};

// A block as a kernel sees it: columns of float32 weights, [column][row] in the chunk of rows at
// hand, that meet consecutive channels of a panel.
struct LiveBlock {
  int64_t x;  // where they begin in the panel, for output 0 of the strip
  int64_t columns;
};

// Some rows of a block row: up to kMaxChunk of them share what they read of x.
constexpr int kMaxChunk = 8;
struct Chunk {
  int rows;
  const float* weights;
  const LiveBlock* blocks;
  int64_t count;
};

struct BatchTask {
  const Chunk* chunks;  // of consecutive outputs
  int64_t count;
  int64_t outputs;
  const float* panel;
  int64_t channel_stride;
  int64_t pixels;  // of the strip
  float* sums;     // scratch: [outputs + kBatchOutputs][kTileVectors * lanes]
  Epilogue epilogue;
};

struct Unit {
  int lanes;
  int chunk;  // the most rows of a Chunk
  // The plane of `x` for taps kd, kw and a row phase; x is all of it.
  void (*pack)(const ConvShape& shape, const void* x, const Strip& strip, const Panel& panel,
               int64_t kd, int64_t phase, int64_t kw, float* plane);
  void (*batch)(const BatchTask& task);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);

}  // namespace gossamer::blocksparse
