#pragma once
// What the two kernels share: which output tile a thread block computes, which columns of the
// weight it has to visit, and where each pixel of the tile takes x from.
#include "blocksparse/cuda.h"
#include "common/conv_pixels.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"

namespace gossamer::blocksparse {

// A convolution as the kernels see it.
struct ConvLayout : ConvPixels {
  const int32_t *crow, *col;
  int nnz, rows, cols;  // blocks
  int padded_rows;      // that a block takes in a tile
  int row_blocks, col_blocks, block_columns;
  int tiles_of_group;  // along the outputs
  int group_in, group_out;
};

inline ConvLayout layout_of(const CudaConvArgs& args) {
  const Weight& w = args.conv.weight;
  ConvLayout layout{};
  static_cast<ConvPixels&>(layout) = ConvPixels(args.conv.shape);
  layout.crow = w.crow_indices, layout.col = w.col_indices;
  layout.nnz = static_cast<int>(w.nnz);
  layout.rows = static_cast<int>(w.rows), layout.cols = static_cast<int>(w.cols);
  layout.padded_rows = args.config.padded_rows(w);
  layout.row_blocks = static_cast<int>(w.row_blocks());
  layout.col_blocks = static_cast<int>(w.col_blocks());
  layout.block_columns = static_cast<int>(w.block_columns());
  layout.tiles_of_group = static_cast<int>(args.config.tiles_of_group(w));
  layout.group_in = static_cast<int>(w.group_in), layout.group_out = static_cast<int>(w.group_out);
  return layout;
}

// Of all tiles.
inline unsigned grid_of(const CudaConvArgs& args) {
  const ConvShape& s = args.conv.shape;
  return static_cast<unsigned>(args.config.blocks(s.batch * s.out_pixels(), args.conv.weight));
}

// ---- outputs ------------------------------------------------------------------------------------

// The outputs of a tile: consecutive block rows of one group, each at a multiple of padded_rows.
// Those of the same pixels follow each other, so that all but the first find their x in the L2.
struct OutputTile {
  int64_t first_pixel;
  int group;
  int first_row;  // block row within the group

  __device__ OutputTile(const ConvLayout& layout, unsigned groups, int tile_pixels,
                        int tile_outputs, unsigned tile) {
    const unsigned of_pixels = groups * static_cast<unsigned>(layout.tiles_of_group);
    const unsigned within = tile % of_pixels;
    first_pixel = int64_t{tile / of_pixels} * tile_pixels;
    group = static_cast<int>(within) / layout.tiles_of_group;
    first_row =
        static_cast<int>(within) % layout.tiles_of_group * (tile_outputs / layout.padded_rows);
  }

  // Block row of an output of the tile, -1 past the group's or in what no block row fills.
  __device__ int64_t block_row(const ConvLayout& layout, int output, int tile_outputs) const {
    const int row = output / layout.padded_rows;
    const bool there =
        row < tile_outputs / layout.padded_rows && first_row + row < layout.row_blocks;
    return there ? int64_t{group} * layout.row_blocks + first_row + row : -1;
  }

  struct Run {
    int64_t first;  // output channel
    int count;      // that there are, of `wanted`
  };
  // Consecutive outputs of the tile that lie in one block row.
  __device__ Run run(const ConvLayout& layout, int output, int wanted, int tile_outputs) const {
    const int row = output / layout.padded_rows, within = output - row * layout.padded_rows;
    if (row >= tile_outputs / layout.padded_rows) return {0, 0};
    const int64_t in_group = int64_t{first_row + row} * layout.rows + within;
    const int64_t left = min(int64_t{layout.rows - within}, layout.group_out - in_group);
    return {int64_t{group} * layout.group_out + in_group,
            static_cast<int>(max(min(left, int64_t{wanted}), int64_t{0}))};
  }
};

// The columns in which one of a tile's block rows has a live block, in increasing order: a merge of
// the rows' lists, by a whole warp. Lane i stands for some outputs; it holds the place in the list
// of the block row that these lie in, and several lanes may hold the same.
//
//   lane 0    2  5  9            next():  column   2   4   5   9
//   lane 1    4  5                        lane 0   x   .   x   x
//                                         lane 1   .   x   x   .
//
// Indices that no check has seen give other columns, but all within the weight.
class LiveColumns {
 public:
  __device__ LiveColumns(const ConvLayout& layout, int64_t block_row)
      : col_(layout.col), last_column_(static_cast<unsigned>(layout.block_columns - 1)) {
    if (block_row >= 0) {
      at_ = min(max(layout.crow[block_row], 0), layout.nnz);
      end_ = min(max(layout.crow[block_row + 1], at_), layout.nnz);
    }
    column_ = column_at(at_);
    following_ = column_at(at_ + 1);
  }

  // The next column, or kNone; the lane's live block in it, or -1.
  __device__ int next(int& block) {
    const int lowest = __reduce_min_sync(kAllLanes, column_);
    block = -1;
    if (lowest != kNone && column_ == lowest) {
      block = at_++;
      column_ = following_;
      following_ = column_at(at_ + 1);
    }
    return lowest;
  }

  static constexpr int kNone = 0x7fffffff;

 private:
  __device__ int column_at(int at) const {
    if (at >= end_) return kNone;
    return static_cast<int>(min(static_cast<unsigned>(col_[at]), last_column_));
  }

  const int32_t* col_;
  unsigned last_column_;
  int at_ = 0, end_ = 0;
  int column_, following_;  // of the block at_, and of the one after it
};

// ---- columns -----------------------------------------------------------------------------------

// One column of the weight: a tap, and channels from one on.
struct Column {
  int channel = 0;     // of the group
  int channels = 0;    // that there are
  int64_t offset = 0;  // of the first element of x, against that of tap 0 and channel 0

  // Whether its tap is another one than before. Most columns have that of the one before them, and
  // what is divided for a tap is divided once.
  __device__ bool move_to(const ConvLayout& layout, int group, int column) {
    const bool other =
        static_cast<unsigned>(column - first_) >= static_cast<unsigned>(layout.col_blocks);
    if (other) move_to_tap(layout, group, column / layout.col_blocks);
    channel = (column - first_) * layout.cols;
    channels = min(layout.cols, layout.group_in - channel);
    offset = first_offset_ + channel * layout.in_channel_stride();
    return other;
  }

  // Whether x has the pixel that this column's tap sees from there.
  __device__ bool sees(const ConvLayout& layout, const Position& from) const {
    return tap_.sees(layout, from);
  }

 private:
  __device__ void move_to_tap(const ConvLayout& layout, int group, int tap) {
    first_ = tap * layout.col_blocks;
    tap_.move_to(layout, tap);
    first_offset_ = tap_.offset() + int64_t{group} * layout.group_in * layout.in_channel_stride();
  }

  int first_ = -0x40000000;  // column of the tap; before all of them
  Tap tap_;
  int64_t first_offset_ = 0;  // of the tap's first channel
};

}  // namespace gossamer::blocksparse
