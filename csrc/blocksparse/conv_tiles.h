#pragma once
// Convolutions by tiles of matrix units: 16 pixels of x times 16 outputs, `depth` channels of one
// tap at a time. The border between conv_tiles.cpp, which cuts the work up, and the unit that runs
// it.
#include <cstdint>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_unit.h"
#include "common/conv_shape.h"
#include "common/epilogue.h"

namespace gossamer::blocksparse {

constexpr int kTile = 16;       // pixels, and outputs, of a tile
constexpr int kMostTiles = 3;   // of pixels that share a tile of weights
constexpr int kMostDepth = 32;  // channels of a tile, a line of the cache

// The part of x that a strip sees, its channels in slabs of `depth`: what a tile reads is then
// consecutive, [plane][group][slab][row][image][column][depth]. Planes, rows and columns are those
// of a Panel (conv_unit.h), except that the images of a strip alternate row by row, so that between
// them lie no rows which are no outputs. Channels past the end of a group are 0.
struct SlabPanel {
  int depth;
  int64_t first_group, groups;
  int64_t slabs;                // of a group
  int64_t images, rows, pitch;  // of a plane
  int64_t slab_stride;          // elements
  int64_t pixel_stride;         // `depth`; or that of x, where that serves as the panel
  bool own_rows, own_columns;
  int64_t planes_h, planes_w;  // of each tap along d
  int64_t packed;              // of its pixels, those that are there
  const uint16_t* data;
  uint16_t* memory;  // the same, or null

  int64_t plane_stride() const { return groups * slabs * slab_stride; }
};

struct LiveTile {
  int64_t x;        // where the panel has what it meets, for output 0 of the strip
  int64_t weights;  // elements from those of the first one
};

// 16 outputs, or as many as are left of a group.
struct RowTile {
  const uint16_t* weights;  // two channels of an output in a 32-bit word: [depth / 2][output][2]
  const LiveTile* tiles;
  int64_t count;
  int64_t first, outputs;
};

struct TileTask {
  const RowTile* row_tiles;
  int64_t count;
  int64_t weight_stride;  // bytes, between two pairs of channels
  bool split_sums;        // of a strip of one tile of pixels: see TileConfig
  const ConvShape* shape;
  const void* x;
  SlabPanel* panel;  // packed as far as it is needed
  Strip strip;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;  // of y
  Epilogue epilogue;  // bias and y from output 0 and the strip's first pixel on
};

// Squares of 16 outputs by 32 channels, in place, to the order of RowTile::weights; two tiles of
// depth 16 lie side by side in one.
void interleave_amx(uint16_t* squares, int64_t count);
// Whether the sums may be trusted. If not, what has been written is not the result.
bool multiply_tiles_amx(const TileTask& task);

// Whether they are what runs.
bool tiles_in_force(const Weight& weight);
// The convolution; false where the vector kernels have to compute it, from the start.
bool conv_tiles(const ConvArgs& args);

}  // namespace gossamer::blocksparse
