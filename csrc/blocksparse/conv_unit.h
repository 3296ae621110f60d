#pragma once
// The border between conv.cpp, which cuts a convolution into tasks, and the units that run parts of
// one with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "common/conv_shape.h"
#include "common/dtype.h"
#include "common/epilogue.h"

namespace gossamer::blocksparse {

struct Weight;

// Of kernels whose lanes are pixels: most registers of output pixels of a tile, fewest outputs of a
// batch (where there are as many), and the outputs that a square of a 16-bit type has.
constexpr int kTileVectors = 12, kBatchOutputs = 64, kSquareOutputs = 32;
// Of kernels whose lanes are outputs: most pixels that they read past a panel's last one.
constexpr int kMostPixels = 28;

// Consecutive output pixels of one image and depth: whole rows, or a part of one; or several whole
// images without depth.
struct Strip {
  int64_t image, images, depth;
  int64_t row, rows;      // of y
  int64_t column, width;  // of y; the whole width where there are several rows
};

// The part of x that a strip sees, as float32. Stride and padding are in it. Pixels that are
// `stride` apart lie next to each other, in one plane of [slabs][rows][pitch][slab] for each phase,
// where a slab is one channel if lanes are pixels, and a few if they are outputs; a tap is a shift
// within its plane:
//
//   output (row, column) of the strip under tap (kd, kh, kw), channel c:
//     plane(kd, kh * dilation % stride, kw * dilation % stride)
//       [c / slab][row + kh * dilation / stride][column + kw * dilation / stride][c % slab]
//
// The sums are computed for whole rows of the plane; those of its columns past the strip's are no
// outputs. Where these would be many (narrow strips), each tap along w has a plane of its own
// instead, and no column more than the strip; and so has each tap along h where that is less memory
// (few rows under a dilated kernel).
struct Panel {
  int64_t first_channel, channels;
  int64_t image_rows;   // of a plane
  int64_t rows, pitch;  // of a plane, of all images
  int64_t slab;         // channels
  int64_t slab_stride;  // floats; a little more than the rows, for the last tile of a shift
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
  int rows;               // those of the last block's padding included where lanes are outputs,
  int outputs;            // and here not
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
  int64_t slab_stride;
  // Floats from a pixel to the next one where lanes are outputs; more than a slab: x where it lies.
  int64_t pixel_stride;
  // Of the panel's columns `width` of each `pitch` are outputs, of its rows `rows` of each
  // `image_rows`.
  int64_t images, image_rows, rows, pitch, width;
  // Where lanes are pixels: so many of them are computed of all outputs before these are written.
  int64_t tile;
  float* sums;  // scratch: [outputs + kSquareOutputs][tile]
  bool channels_last;
  int64_t image_stride;  // of y
  Epilogue epilogue;     // out_stride: between pixels, or between outputs where these come first
};

struct Kernel {
  const char* name;
  int slab;       // channels of the panel's slabs
  int row_step;   // what a chunk's rows are a multiple of,
  int most_rows;  // and the most of them
  bool in_place;  // reads x where it lies, too, if no pixel of it is outside
  // A plane of x (all of it is given), whose first pixel is seen by the strip's first output with
  // the offsets along d, h and w.
  void (*pack)(const ConvShape& shape, const void* x, const Strip& strip, const Panel& panel,
               const int64_t (&offset)[3], float* plane);
  void (*batch)(const BatchTask& task);
};

struct Unit {
  int lanes;
  Kernel pixel_lanes;   // any shape
  Kernel output_lanes;  // channels-last; blocks that fill the lanes and do not cross slabs
  // What becomes of a tile's sums that are computed elsewhere, with lanes of pixels: those [q, end)
  // in the columns of the panel.
  void (*finish)(const BatchTask& task, int64_t q, int64_t end);
  // The blocks [begin, end) as float32, each transposed.
  void (*expand)(const Weight& weight, int64_t begin, int64_t end, float* to);
};

// Null where the unit has no kernels for the dtype.
const Unit* unit_avx2(DType dtype);
const Unit* unit_avx512(DType dtype);

}  // namespace gossamer::blocksparse
