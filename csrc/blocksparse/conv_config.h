#pragma once
// How a convolution is cut up: a pure function of its shape and weight, the unit and the threads.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_unit.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/target.h"

namespace gossamer::blocksparse {

// The unit of a target; null where it has none of its own for the dtype.
const Unit* unit_of(Target target, DType dtype);
// The target whose kernels run, and its unit; null where that is the serial definition.
std::pair<Target, const Unit*> unit_in_force(DType dtype);

struct ConvConfig {
  int64_t strip_images;             // several where a strip holds whole images,
  int64_t strip_rows, strip_width;  // of y
  int64_t parts;                    // of the block rows; each packs its own panels
  int64_t batch_outputs, tile_vectors;
  int threads;
  bool in_place = false;  // x serves as the panel
};

// The same convolution with its pixels in as few rows as they go: where no pixel of x is seen by
// two outputs and none is left out, all of them are one row.
inline ConvShape collapsed(ConvShape s) {
  for (int axis = 0; axis < 3; ++axis) {
    if (s.kernel[axis] != 1 || s.stride[axis] != 1 || s.padding[axis] != 0 ||
        s.in[axis] != s.out[axis]) {
      return s;
    }
  }
  const int64_t images = s.channels_last ? s.batch : 1;  // whose pixels follow each other
  s.in[2] = s.out[2] = images * s.out_pixels();
  s.batch /= images;
  s.in[0] = s.out[0] = s.in[1] = s.out[1] = 1;
  return s;
}

// Whether an image is one row, each of whose pixels is seen by one output.
inline bool is_row(const ConvShape& s) {
  for (int axis = 0; axis < 3; ++axis) {
    if (s.kernel[axis] != 1 || s.stride[axis] != 1 || s.padding[axis] != 0) return false;
  }
  return s.out[0] * s.out[1] == 1 && s.in[2] == s.out[2];
}

// Taps of one phase see the same pixels, each shifted by `shift` of them.
inline int64_t phase(const ConvShape& s, int axis, int64_t tap) {
  return tap * s.dilation[axis] % s.stride[axis];
}
inline int64_t shift(const ConvShape& s, int axis, int64_t tap) {
  return tap * s.dilation[axis] / s.stride[axis];
}
inline int64_t most_shift(const ConvShape& s, int axis) {
  return shift(s, axis, s.kernel[axis] - 1);
}
inline int64_t phases(const ConvShape& s, int axis) {
  int64_t count = 1;
  for (int64_t tap = 0; tap < s.kernel[axis]; ++tap) {
    count = std::max(count, phase(s, axis, tap) + 1);
  }
  return count;
}

// Without its memory. `channels` are those of the groups that a task works on.
inline Panel panel_of(const ConvShape& s, int64_t images, int64_t rows, int64_t width,
                      int64_t channels, int64_t lanes, int64_t slab) {
  Panel panel{};
  panel.channels = channels;
  panel.slab = slab;
  // Columns past the strip's cost arithmetic, a plane for each tap costs packing.
  panel.own_columns = 10 * most_shift(s, 2) > width;
  panel.own_rows = s.kernel[1] * rows < phases(s, 1) * (rows + most_shift(s, 1));
  panel.image_rows = rows + (panel.own_rows ? 0 : most_shift(s, 1));
  panel.rows = images * panel.image_rows;
  panel.pitch = width + (panel.own_columns ? 0 : most_shift(s, 2));
  // A shift along w of the last output's tile ends at most that much past the last row.
  const int64_t pixels = panel.rows * panel.pitch + (panel.pitch - width);
  const int64_t readable = slab == 1 ? ceil_div(pixels, lanes) * lanes + lanes : pixels + 1;
  // An odd number of lines: the slabs of a pixel are spread over all sets of the caches.
  constexpr int64_t kLine = 64 / sizeof(float);
  panel.slab_stride = (ceil_div(readable * slab, kLine) | 1) * kLine;
  panel.plane_stride = ceil_div(channels, slab) * panel.slab_stride;
  return panel;
}
inline int64_t planes_h(const ConvShape& s, const Panel& panel) {
  return panel.own_rows ? s.kernel[1] : phases(s, 1);
}
inline int64_t planes_w(const ConvShape& s, const Panel& panel) {
  return panel.own_columns ? s.kernel[2] : phases(s, 2);
}
inline int64_t planes(const ConvShape& s, const Panel& panel) {
  return s.kernel[0] * planes_h(s, panel) * planes_w(s, panel);
}

// Lanes are outputs where that needs no transposing.
inline const Kernel& choose_kernel(const ConvShape& s, const Weight& w, const Unit& unit) {
  const int64_t slab = unit.output_lanes.slab;
  const bool slabs_hold = w.cols % slab == 0 || slab % w.cols == 0;
  const bool groups_hold = w.groups == 1 || w.group_in % slab == 0;
  const bool fits = s.channels_last && w.rows % unit.lanes == 0 && slabs_hold && groups_hold;
  return fits ? unit.output_lanes : unit.pixel_lanes;
}

// Packing costs as much as it takes to bring x from the L3, and saves little where each number of
// it meets two blocks or fewer. The more channels, the fewer of the L1's sets the pixels of a tile
// share, from which they push each other.
inline bool reads_in_place(const ConvShape& s, const Weight& w, const Kernel& kernel) {
  if (!kernel.in_place || s.batch > 1 || !is_row(s)) return false;
  if (s.in_channels <= kernel.slab || s.in_channels > 512) return false;
  const int64_t reads = w.nnz * ceil_div(w.rows, kernel.most_rows) * w.cols;
  return reads <= std::min<int64_t>(640, s.in_channels * 5 / 2);
}

// Of a ConvConfig, or another that cuts y the same way.
template <class Config>
int64_t strips_of(const ConvShape& s, const Config& config) {
  return ceil_div(s.batch, config.strip_images) * s.out[0] * ceil_div(s.out[1], config.strip_rows) *
         ceil_div(s.out[2], config.strip_width);
}

// Registers of pixels that strips of so many rows take, those of a last shorter one included.
inline int64_t vectors_of(const ConvShape& s, int64_t rows, int64_t pitch, int64_t lanes) {
  const auto of_strip = [&](int64_t r) { return ceil_div((r - 1) * pitch + s.out[2], lanes); };
  const int64_t rest = s.out[1] % rows;
  return s.out[1] / rows * of_strip(rows) + (rest == 0 ? 0 : of_strip(rest));
}

// Channels-last, y is written a pixel at a time: all outputs of it together, as long as their
// weights, which are read again for every tile, and their sums stay in the L2. Its prefetcher then
// brings the lines of y.
inline void choose_batch(const ConvShape& s, const Weight& w, int64_t lanes, int64_t l2,
                         ConvConfig* config) {
  constexpr int kVectors = 3;  // a tile is a whole number of what a broadcast weight meets
  const int64_t weight_bytes = ceil_div(4 * w.nnz * w.rows * w.cols, s.out_channels);
  const int64_t sum_bytes = 4 * kVectors * lanes;
  const int64_t fit = std::min(l2 / 4 / std::max<int64_t>(weight_bytes, 1), l2 / 8 / sum_bytes);
  config->batch_outputs = std::min(std::max<int64_t>(fit, kBatchOutputs), s.out_channels);
  const int64_t tiles = l2 / 8 / (sum_bytes * config->batch_outputs);
  config->tile_vectors = std::clamp<int64_t>(tiles * kVectors, kVectors, kTileVectors);
}

// A strip's panel takes half of the L2, which it shares with the weights of a batch of outputs.
// `kept` weights meet each pixel; the outputs can be shared out among `shares` at most.
inline ConvConfig choose_strips(const ConvShape& s, int64_t kept, int64_t shares, int64_t slab,
                                int64_t lanes, int64_t l2, int threads) {
  const int64_t panel_bytes = l2 / 2;
  const double work = static_cast<double>(s.batch) * s.out_pixels() * kept;
  const int team = threads_for_work(threads, work);
  const auto bytes = [&](int64_t rows, int64_t width) {
    const Panel panel = panel_of(s, 1, rows, width, s.in_channels, lanes, slab);
    return 4 * planes(s, panel) * panel.plane_stride;
  };
  ConvConfig config{1, s.out[1], s.out[2], 1, kBatchOutputs, kTileVectors, team};
  int64_t most_rows = 1, too_many = s.out[1] + 1;
  while (too_many - most_rows > 1) {
    const int64_t rows = (most_rows + too_many) / 2;
    (bytes(rows, s.out[2]) > panel_bytes ? too_many : most_rows) = rows;
  }
  config.strip_rows = ceil_div(s.out[1], ceil_div(s.out[1], most_rows));
  // Of about that many rows those whose pixels fill the registers best.
  const int64_t pitch = panel_of(s, 1, 1, s.out[2], 1, lanes, slab).pitch;
  int64_t fewest = vectors_of(s, config.strip_rows, pitch, lanes);
  for (int64_t rows = config.strip_rows + 1; rows <= std::min(most_rows, config.strip_rows + 3);
       ++rows) {
    if (vectors_of(s, rows, pitch, lanes) < fewest) {
      fewest = vectors_of(s, rows, pitch, lanes);
      config.strip_rows = rows;
    }
  }
  // A part of a row is a whole number of tiles; where lanes are outputs, tiles of any even size are
  // made of it.
  const bool pixel_lanes = slab == 1;
  const int64_t tile = pixel_lanes ? kTileVectors * lanes : 2;
  // All weights are read again for each part, which costs more than a panel larger than the L2.
  const int64_t narrow = pixel_lanes ? tile : 4 * kMostPixels;
  while (config.strip_rows == 1 && config.strip_width > narrow &&
         bytes(1, config.strip_width) > panel_bytes) {
    config.strip_width = ceil_div(ceil_div(config.strip_width, 2), tile) * tile;
  }
  // Small images together, so that the weights are read once for all of them.
  if (s.out[0] == 1 && config.strip_rows == s.out[1] && config.strip_width == s.out[2]) {
    const int64_t fit =
        std::max<int64_t>(panel_bytes / std::max<int64_t>(bytes(s.out[1], s.out[2]), 1), 1);
    config.strip_images = std::min(fit, ceil_div(s.batch, team));
  }
  // Fewer strips than threads, or a last round of them with idle threads: shorter ones where that
  // costs little (rows are read again around each), else the outputs are shared out.
  const auto strips = [&] { return strips_of(s, config); };
  const auto idle = [&](int64_t tasks) {
    return static_cast<double>(ceil_div(tasks, team) * team - tasks) / tasks;
  };
  if (config.strip_images == 1 && idle(strips()) > 0.1 &&
      config.strip_rows >= 8 * (1 + most_shift(s, 1))) {
    config.strip_rows = ceil_div(config.strip_rows, team);
  } else if (config.strip_images == 1 && idle(strips()) > 0.1 && config.strip_rows == 1 &&
             config.strip_width >= (pixel_lanes ? 4 * tile : team * kMostPixels)) {
    config.strip_width = ceil_div(ceil_div(config.strip_width, team), tile) * tile;
  }
  if (idle(strips()) > 0.1) config.parts = std::min<int64_t>(team, shares);
  return config;
}

inline ConvConfig choose_conv_config(const ConvShape& s, const Weight& w, const Unit& unit,
                                     int64_t l2, int threads) {
  const Kernel& kernel = choose_kernel(s, w, unit);
  ConvConfig config = choose_strips(s, w.nnz * w.rows * w.cols, w.block_rows(), kernel.slab,
                                    unit.lanes, l2, threads);
  config.in_place = reads_in_place(s, w, kernel);
  if (s.channels_last) choose_batch(s, w, unit.lanes, l2, &config);
  return config;
}

}  // namespace gossamer::blocksparse
