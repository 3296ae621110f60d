#pragma once
// The border between dvalues.cpp, which cuts the gradient of a weight into tasks, and the units
// that run parts of one with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "blocksparse/conv_unit.h"
#include "common/ceil_div.h"

namespace gossamer::blocksparse {

// How a pixel's channels lie in the panel of a strip (conv_unit.h): a slab is a register of them.
// The blocks of a span of channels lie in its slabs, none of them in two unless it begins the
// first.
struct Slabs {
  int64_t groups, first_group;
  int64_t channels;  // of a group
  int64_t span;  // of channels: those of a slab where whole blocks fill it, else those of a block
  int64_t lanes;

  int64_t of_span() const { return ceil_div(span, lanes); }
  int64_t of_group() const { return ceil_div(channels, span) * of_span(); }
};

// dy of a strip: for each block row [rows, those of the last part made a power of two][pixel][rows
// of a part], a part being as many rows as there are lanes.
struct Rows {
  int64_t of_block, lanes;

  int64_t part(int64_t first) const {  // the rows of the part from `first` on
    int64_t rows = lanes;
    while (rows / 2 >= of_block - first) rows /= 2;
    return rows;
  }
  int64_t padded() const {
    const int64_t whole = of_block / lanes * lanes;
    return whole == of_block ? whole : whole + part(whole);
  }
};

// sums[piece][row][lane] += the sum over pixels of dy[pixel][row] * x[pixel + offset of the piece],
// where a piece is as many columns of a block as there are lanes.
struct DvaluesPass {
  const float* x;  // in the panel, of the first pixel
  const int64_t* offsets;
  int64_t pieces;
  const float* dy;                   // the pixels that x has, without gaps
  int64_t images, rows, length;      // the pixels: runs of `length` of them
  int64_t image_stride, row_stride;  // floats of x from run to run
  int64_t part;                      // rows of dy
  float* sums;
  int64_t piece_stride;  // floats
};

struct DvaluesUnit {
  int lanes;
  // A plane of the panel, as Kernel has it.
  void (*pack_x)(const ConvShape& shape, const void* x, const Strip& strip, const Panel& panel,
                 const Slabs& slabs, const int64_t (&offset)[3], float* plane);
  // dy of the block rows [begin, end).
  void (*pack_dy)(const ConvShape& shape, const void* dy, const Strip& strip, const Rows& rows,
                  int64_t begin, int64_t end, float* to);
  void (*multiply)(const DvaluesPass& pass);
};

// Null where the unit has no kernels for the dtype.
const DvaluesUnit* dvalues_unit_avx2(DType dtype);
const DvaluesUnit* dvalues_unit_avx512(DType dtype);

}  // namespace gossamer::blocksparse
