#pragma once
// Which tiles of a weight hold a live block, and their weights as tiles.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_tiles.h"
#include "common/ceil_div.h"

namespace gossamer::blocksparse {

// A live tile of a tile of outputs.
struct Place {
  int32_t tap, slab;
  int64_t weights;  // as in LiveTile
};

// The live tiles of 16 outputs, in the order in which they are multiplied: the taps of a slab
// follow each other, which read nearly the same pixels.
class LiveTiles {
 public:
  LiveTiles(const Weight& weight, int depth)
      : weight_(weight),
        shift_(std::countr_zero(static_cast<unsigned>(depth))),
        slabs_(ceil_div(weight.group_in, depth)),
        words_(ceil_div(weight.taps * slabs_, int64_t{64})),
        before_(words_.size()) {}

  int64_t row_tiles_of_group() const { return ceil_div(weight_.group_out, kTile); }

  // Of a tile of outputs; their number.
  int64_t find(int64_t row_tile) {
    std::fill(words_.begin(), words_.end(), 0);
    first_ = row_tile % row_tiles_of_group() * kTile;
    outputs_ = std::min<int64_t>(kTile, weight_.group_out - first_);
    const int64_t rows_before = row_tile / row_tiles_of_group() * weight_.row_blocks();
    group_begin_ = rows_before;
    begin_ = rows_before + first_ / weight_.rows;
    end_ = rows_before + (first_ + outputs_ - 1) / weight_.rows + 1;
    for_each_piece(
        [&](const Piece& piece) { words_[piece.at / 64] |= uint64_t{1} << piece.at % 64; });
    int64_t count = 0;
    for (size_t i = 0; i < words_.size(); ++i) {
      before_[i] = count;
      count += std::popcount(words_[i]);
    }
    return count;
  }

  void places(Place* to) const {
    int64_t weights = 0;
    for (size_t i = 0; i < words_.size(); ++i) {
      for (uint64_t word = words_[i]; word != 0; word &= word - 1) {
        const auto at = static_cast<int64_t>(64 * i) + std::countr_zero(word);
        *to++ = {static_cast<int32_t>(at % weight_.taps), static_cast<int32_t>(at / weight_.taps),
                 weights};
        weights += int64_t{kTile} << shift_;
      }
    }
  }

  // Squares of 16 outputs by kMostDepth channels.
  static int64_t squares(int64_t tiles, int depth) { return ceil_div(tiles * depth, kMostDepth); }

  void expand(int64_t count, uint16_t* to) const {
    const int64_t all = squares(count, 1 << shift_);
    std::memset(to, 0, all * kTile * kMostDepth * sizeof(uint16_t));
    for_each_piece([&](const Piece& piece) {
      const int64_t tile = tile_of(piece.at);
      if (weight_.packed) {
        copy_packed(piece, to + (tile << shift_) * kTile);
      } else {
        copy(piece, to + (tile << shift_) / kMostDepth * kTile * kMostDepth +
                        (tile << shift_) % kMostDepth);
      }
    });
    if (!weight_.packed) interleave_amx(to, all);
  }

  // Packed blocks that fill tiles are what `expand` would make of them: where each tile begins.
  void locate_packed(Place* to) const {
    const int64_t row = first_ % weight_.rows;
    for_each_piece([&](const Piece& piece) {
      to[tile_of(piece.at)].weights =
          (piece.block * weight_.cols + piece.skipped) * weight_.rows + 2 * row;
    });
  }

 private:
  // What of a block of the tile's outputs lies in one slab: `columns` of it from `skipped` on,
  // which meet the slab from `in_slab` on.
  struct Piece {
    int64_t block_row, block;
    int64_t at;  // slab, tap
    int64_t skipped, in_slab, columns;
  };
  template <class Body>
  void for_each_piece(const Body& body) const {
    const auto col_blocks = static_cast<uint32_t>(weight_.col_blocks());
    const int64_t depth = int64_t{1} << shift_;
    for (int64_t row = begin_; row < end_; ++row) {
      for (int64_t b = weight_.crow_indices[row]; b < weight_.crow_indices[row + 1]; ++b) {
        const auto block_column = static_cast<uint32_t>(weight_.col_indices[b]);
        const uint32_t tap = block_column / col_blocks;
        const int64_t begin = (block_column - tap * col_blocks) * weight_.cols;
        const int64_t end = std::min(begin + weight_.cols, weight_.group_in);
        for (int64_t column = begin, stop; column < end; column = stop) {
          const int64_t slab = column >> shift_;
          stop = std::min(end, (slab + 1) << shift_);
          body({row, b, slab * weight_.taps + tap, column - begin, column & (depth - 1),
                stop - column});
        }
      }
    }
  }

  int64_t tile_of(int64_t at) const {
    const uint64_t below = words_[at / 64] & ((uint64_t{1} << at % 64) - 1);
    return before_[at / 64] + std::popcount(below);
  }
  // Of the block's first row among the outputs of the tile, which it may begin before.
  int64_t row_of(const Piece& piece) const {
    return (piece.block_row - group_begin_) * weight_.rows - first_;
  }

  // Into a square of rows of kMostDepth.
  void copy(const Piece& piece, uint16_t* square) const {
    const int64_t row = row_of(piece), begin = std::max<int64_t>(row, 0);
    const int64_t rows = std::min(row + weight_.rows, outputs_) - begin;
    const auto* from = static_cast<const uint16_t*>(weight_.values) +
                       (piece.block * weight_.rows + begin - row) * weight_.cols + piece.skipped;
    uint16_t* to = square + begin * kMostDepth + piece.in_slab;
    const auto by = [&](int64_t size) {
      for (int64_t r = 0; r < rows; ++r, from += weight_.cols, to += kMostDepth) {
        std::memcpy(to, from, size * sizeof(uint16_t));
      }
    };
    if (piece.columns == 16) return by(16);
    if (piece.columns == 32) return by(32);
    if (piece.columns == 8) return by(8);
    by(piece.columns);
  }

  // Between words of two columns each.
  void copy_packed(const Piece& piece, uint16_t* tile) const {
    const int64_t row = row_of(piece), begin = std::max<int64_t>(row, 0);
    const int64_t rows = std::min(row + weight_.rows, outputs_) - begin;
    const int64_t block_size = ceil_div(weight_.cols, int64_t{2}) * weight_.rows * 2;
    const auto* block = static_cast<const uint16_t*>(weight_.values) + piece.block * block_size;
    const bool whole_words = (piece.skipped | piece.in_slab | piece.columns) % 2 == 0;
    for (int64_t c = 0; c < piece.columns; c += whole_words ? 2 : 1) {
      const int64_t from_column = piece.skipped + c, to_column = piece.in_slab + c;
      const uint16_t* from =
          block + (from_column / 2 * weight_.rows + begin - row) * 2 + from_column % 2;
      uint16_t* to = tile + (to_column / 2 * kTile + begin) * 2 + to_column % 2;
      if (whole_words) {
        std::memcpy(to, from, rows * 2 * sizeof(uint16_t));
      } else {
        for (int64_t r = 0; r < rows; ++r) to[2 * r] = from[2 * r];
      }
    }
  }

  const Weight& weight_;
  int shift_;  // of the depth, a power of two
  int64_t slabs_;
  std::vector<uint64_t> words_;  // a bit for each (slab, tap)
  std::vector<int64_t> before_;  // bits set in the words before
  int64_t first_ = 0, outputs_ = 0, group_begin_ = 0, begin_ = 0, end_ = 0;
};

}  // namespace gossamer::blocksparse
