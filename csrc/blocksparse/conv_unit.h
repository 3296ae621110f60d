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
constexpr int kTileVectors = 12, kBatchOutputs = 64;

// Consecutive output pixels of one image and depth: whole rows, or a part of one; or several whole
// images without depth.
struct Strip {
  int64_t image, images, depth;
  int64_t row, rows;      // of y
  int64_t column, width;  // of y; the whole width where there are several rows
};

// The part of x that a strip sees, as float32 with the pixels of a channel side by side: what a
// register of outputs reads for one weight is then consecutive. Stride and padding are in it.
// Pixels that are `stride` apart lie next to each other, in one plane of [channels][rows][pitch]
// for each phase; a tap is a shift within its plane:
//
//   output (row, column) of the strip under tap (kd, kh, kw), channel c:
//     plane(kd, kh * dilation % stride, kw * dilation % stride)
//       [c][row + kh * dilation / stride][column + kw * dilation / stride]
//
// The sums are computed for whole rows of the plane; those of its columns past the strip's are no
// outputs. Where these would be many (narrow strips), each tap along w has a plane of its own
// instead, and no column more than the strip; and so has each tap along h where that is less memory
// (few rows under a dilated kernel).
struct Panel {
  int64_t first_channel, channels;
  int64_t image_rows;      // of a plane
  int64_t rows, pitch;     // of a plane, of all images
  int64_t channel_stride;  // floats; a little more than the rows, for the last register of a shift
  int64_t plane_stride;
  bool own_rows, own_columns;  // a plane for each tap along h, along w
  float* data;
};

// A block as a kernel sees it: columns of weights that meet consecutive channels of a panel.
struct LiveBlock {
  int64_t x;  // where they begin in the panel, for output 0 of the strip
  int64_t columns;
};

// Some rows of a block row, which share what they read of x.
struct Chunk {
  int rows;
  const float* weights;   // of the chunk's first row in its first block, [column][row of a block]
  int64_t column_stride;  // floats from a column to the next one,
  int64_t block_stride;   // and from a block to the next one
  const LiveBlock* blocks;
  int64_t count;
};

struct BatchTask {
  const Chunk* chunks;  // of consecutive outputs
  int64_t count;
  int64_t outputs;
  const float* panel;
  int64_t channel_stride;
  // Of the panel's columns `width` of each `pitch` are outputs, of its rows `rows` of each
  // `image_rows`.
  int64_t images, image_rows, rows, pitch, width;
  float* sums;  // scratch: [outputs + kBatchOutputs][kTileVectors * lanes]
  bool channels_last;
  int64_t image_stride;  // of y
  Epilogue epilogue;     // out_stride: between pixels, or between outputs where these come first
};

struct Unit {
  int lanes;
  int chunk;  // the most rows of a Chunk
  // A plane of x (all of it is given), whose first pixel is seen by the strip's first output with
  // the offsets along d, h and w.
  void (*pack)(const ConvShape& shape, const void* x, const Strip& strip, const Panel& panel,
               const int64_t (&offset)[3], float* plane);
  void (*batch)(const BatchTask& task);
  // `count` blocks as float32, each transposed.
  void (*expand)(const void* values, int64_t rows, int64_t cols, int64_t count, float* to);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);

}  // namespace gossamer::blocksparse
