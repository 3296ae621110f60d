#pragma once
// Whether a convolution is worth tiles, and how it is cut up for them: pure functions of its shape,
// weight, cache and threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_config.h"
#include "blocksparse/conv_tiles.h"
#include "common/ceil_div.h"
#include "common/parallel.h"

namespace gossamer::blocksparse {

struct TileConfig {
  int depth;
  bool in_place;  // x serves as the panel
  bool own_columns;
  // Each sum in three parts, that the products of a single tile of pixels need not wait for each
  // other. The rounding is another one then, so this does not depend on the number of threads.
  bool split_sums;
  int64_t strip_images, strip_rows, strip_width;
  int64_t parts;  // of the tiles of outputs
  int threads;
};

// Tiles of outputs by taps by slabs that hold a live block, if these lie at random.
inline double live_tiles(const Weight& w, int depth) {
  const int64_t row_tiles = w.groups * ceil_div(w.group_out, kTile);
  const int64_t column_tiles = w.taps * ceil_div(w.group_in, depth);
  const double density =
      static_cast<double>(w.nnz) / static_cast<double>(w.block_rows() * w.block_columns());
  const auto met = [](int64_t tile, int64_t block, int64_t all) {  // blocks that a tile meets
    const int64_t size = std::min(tile, all);
    return block % size == 0 ? 1.0 : std::max(1.0, static_cast<double>(size) / block);
  };
  const double blocks = met(kTile, w.rows, w.group_out) * met(depth, w.cols, w.group_in);
  return row_tiles * column_tiles * (1 - std::pow(1 - density, blocks));
}

// Cycles of a product of tiles. The unit takes 20 for either depth, but 32 channels are twice the
// lines to read: between 25 and over 40 cycles, by the number of channels.
inline double tile_cycles(int depth) { return depth == kMostDepth ? 32 : 22; }

inline int choose_depth(const Weight& w) {
  const double deep = live_tiles(w, kMostDepth) * tile_cycles(kMostDepth);
  return deep < live_tiles(w, kMostDepth / 2) * tile_cycles(kMostDepth / 2) ? kMostDepth
                                                                            : kMostDepth / 2;
}

// Against the vector kernels, which take about 0.7 cycles a weight for 16 pixels.
inline bool tiles_win(const Weight& w) {
  const int depth = choose_depth(w);
  const double vectors = 0.7 * static_cast<double>(w.nnz) * w.rows * w.cols;
  return w.dtype == DType::kBFloat16 && live_tiles(w, depth) * tile_cycles(depth) < vectors;
}

// Without its memory.
inline SlabPanel slab_panel(const ConvShape& s, const TileConfig& config, int64_t images,
                            int64_t rows, int64_t width, int64_t groups) {
  SlabPanel panel{};
  panel.depth = config.depth;
  panel.groups = groups;
  panel.slabs = ceil_div(s.group_in(), config.depth);
  panel.own_columns = config.own_columns;
  panel.own_rows = s.kernel[1] * rows < phases(s, 1) * (rows + most_shift(s, 1));
  panel.planes_h = panel.own_rows ? s.kernel[1] : phases(s, 1);
  panel.planes_w = panel.own_columns ? s.kernel[2] : phases(s, 2);
  panel.images = images;
  panel.rows = rows + (panel.own_rows ? 0 : most_shift(s, 1));
  panel.pitch = width + (panel.own_columns ? 0 : most_shift(s, 2));
  panel.slab_stride = (panel.rows * images * panel.pitch + kTile) * config.depth;
  panel.pixel_stride = config.depth;
  return panel;
}
// Elements: a tile that begins at the last pixel ends past it.
inline int64_t panel_size(const ConvShape& s, const SlabPanel& panel) {
  return s.kernel[0] * panel.planes_h * panel.planes_w * panel.plane_stride() +
         (kTile + most_shift(s, 2)) * panel.depth;
}

// Where no pixel is seen by two outputs, x can be read as it lies, 16 rows of it a tile. In a
// packed panel the rows of a tile follow each other: half the lines, and not all in the same sets
// of the cache where a pixel has many channels. That pays where a tile of x is read often.
inline bool read_in_place(const ConvShape& s, const Weight& w, int depth) {
  if (!s.channels_last || s.batch > 1 || !is_row(s) || w.group_in % depth != 0) return false;
  const double uses = live_tiles(w, depth) / (w.groups * ceil_div(w.group_in, depth));
  return s.in_channels <= 512 || uses < 4;
}

// A strip's panel takes half of the L2, which it shares with the weights.
inline TileConfig choose_tile_config(const ConvShape& s, const Weight& w, int64_t l2, int threads) {
  const double work = static_cast<double>(s.batch) * s.out_pixels() * w.nnz * w.rows * w.cols;
  const int team = threads_for_work(threads, work / 8);
  TileConfig config{choose_depth(w), false, false, false, 1, s.out[1], s.out[2], 1, team};
  config.in_place = read_in_place(s, w, config.depth);
  // A plane for each tap along w costs packing, columns past the strip's cost products.
  const double products = live_tiles(w, config.depth) * tile_cycles(config.depth) / kTile;
  const double copies = 8.0 * w.groups * ceil_div(w.group_in, config.depth) *
                        static_cast<double>(s.kernel[2] - phases(s, 2)) * phases(s, 1);
  const auto overhang = static_cast<double>(most_shift(s, 2));
  config.own_columns = overhang / s.out[2] * products > copies;
  const auto bytes = [&](int64_t images, int64_t rows, int64_t width) {
    return 2 * panel_size(s, slab_panel(s, config, images, rows, width, s.groups));
  };
  const auto most = [&](int64_t count, const auto& size) {  // up to count, of which half the L2 is
    int64_t fits = 1, too_many = count + 1;
    while (too_many - fits > 1) {
      const int64_t middle = (fits + too_many) / 2;
      (size(middle) > l2 / 2 ? too_many : fits) = middle;
    }
    return fits;
  };
  const auto even = [](int64_t all, int64_t most) { return ceil_div(all, ceil_div(all, most)); };
  config.strip_rows =
      even(s.out[1], most(s.out[1], [&](int64_t rows) { return bytes(1, rows, s.out[2]); }));
  constexpr int64_t kPixels = 96;
  if (config.strip_rows == 1 && !config.in_place) {
    const int64_t fit = most(s.out[2], [&](int64_t width) { return bytes(1, 1, width); });
    const int64_t parts = ceil_div(s.out[2], std::max(fit, kPixels));
    config.strip_width = ceil_div(ceil_div(s.out[2], parts), kTile) * kTile;
    if (parts == 1) config.strip_width = s.out[2];
  }
  const auto one_tile = [&](int64_t rows) {  // of an image
    const int64_t past = config.own_columns ? 0 : most_shift(s, 2);
    return rows * (config.strip_width + past) - past <= kTile;
  };
  const bool alone = config.in_place ? s.out[2] < 2 * kTile : one_tile(config.strip_rows);
  config.split_sums = alone;
  const bool whole_images =
      s.out[0] == 1 && config.strip_rows == s.out[1] && config.strip_width == s.out[2];
  if (whole_images && s.channels_last && s.batch > 1) {
    // Images that alternate are further apart for a tap along h, and leave the L1 between its uses.
    // Several only where one fills its tiles badly, or the weights fill the cache; two tiles at
    // least where they fit, whose sums need not be split.
    const int64_t fit_all =
        most(s.batch, [&](int64_t images) { return bytes(images, s.out[1], s.out[2]); });
    config.split_sums = alone && fit_all == 1;
    const int64_t least = alone ? std::min<int64_t>(fit_all, 2) : 1;
    const int64_t share = std::max(ceil_div(s.batch, team), least);
    const int64_t fit = std::min(fit_all, share);
    const double weights = 2.0 * kTile * config.depth * live_tiles(w, config.depth);
    const int64_t pixels = s.out[1] * (s.out[2] + (config.own_columns ? 0 : most_shift(s, 2)));
    const auto filled_badly = [&](int64_t images) {
      return ceil_div(images * pixels, kTile) * kTile * 12 > images * pixels * 13;
    };
    int64_t images = weights > l2 / 4 ? fit : least;
    while (images < fit && filled_badly(images)) ++images;
    config.strip_images = even(share, images);
  }
  const auto strips = [&] { return strips_of(s, config); };
  const auto idle = [&] {
    return static_cast<double>(ceil_div(strips(), team) * team - strips()) / strips();
  };
  if (config.strip_images == 1 && idle() > 0.1) {
    const bool tiles_left = alone || !one_tile(ceil_div(config.strip_rows, team));
    if (config.strip_rows >= 2 * team * (1 + most_shift(s, 1)) && tiles_left) {
      config.strip_rows = ceil_div(config.strip_rows, team);
    } else if (config.strip_rows == 1 && config.strip_width >= 2 * kPixels * team) {
      config.strip_width = ceil_div(ceil_div(config.strip_width, team), kTile) * kTile;
    }
  }
  if (idle() > 0.1) {
    config.parts = std::min<int64_t>(team, w.groups * ceil_div(w.group_out, kTile));
  }
  return config;
}

}  // namespace gossamer::blocksparse
