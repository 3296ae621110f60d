// Cuts a convolution into tasks for a unit that multiplies tiles.
#include "blocksparse/conv_tiles.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "blocksparse/conv_strips.h"
#include "blocksparse/conv_tiles_config.h"
#include "blocksparse/live_tiles.h"
#include "common/cache_size.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace gossamer::blocksparse {
namespace {

thread_local Scratch panel_scratch, weight_scratch, own_weight_scratch;

class Convolution {
 public:
  Convolution(const ConvArgs& args, const ConvShape& shape, const TileConfig& config)
      : args_(args),
        w_(args.weight),
        s_(shape),
        config_(config),
        of_group_(ceil_div(w_.group_out, kTile)),
        row_tiles_(w_.groups * of_group_),
        in_place_(w_.packed && w_.rows % kTile == 0 && w_.cols % config.depth == 0) {}

  bool run() {
    // Weights that one task alone reads it expands for itself, into its cache.
    const bool shared = strips_of(s_, config_) > 1;
    if (shared) expand_all();
    std::atomic<bool> trusted = true;
    for_each_strip(s_, config_, [&](const Strip& strip, int64_t part) {
      if (!trusted) return;
      const int64_t begin = row_tiles_ * part / config_.parts;
      const int64_t end = row_tiles_ * (part + 1) / config_.parts;
      const auto part_of = [&](int64_t from, int64_t to, bool split) {
        Strip some = strip;
        some.column += from, some.width = to - from;
        return from == to ||
               (shared ? run_strip(some, begin, end, split) : run_alone(some, begin, end, split));
      };
      // x in its place has no pixels past the last tile.
      const int64_t whole = config_.in_place ? strip.width / kTile * kTile : 0;
      const bool split = config_.split_sums;
      if (!part_of(0, whole, split) || !part_of(whole, strip.width, split || config_.in_place)) {
        trusted = false;
      }
    });
    return trusted;
  }

 private:
  void expand_all() {
    begin_.assign(row_tiles_ + 1, 0);
    std::vector<int64_t> squares(row_tiles_ + 1, 0);
    // Some ten microseconds of work for each of them.
    const int team = threads_for_bytes(config_.threads, w_.nnz * w_.rows * w_.cols / 2);
    parallel_ranges(team, row_tiles_, [&](int64_t begin, int64_t end) {
      LiveTiles live(w_, config_.depth);
      for (int64_t t = begin; t < end; ++t) begin_[t + 1] = live.find(t);
    });
    for (int64_t t = 0; t < row_tiles_; ++t) {
      const int64_t expanded = in_place_ ? 0 : LiveTiles::squares(begin_[t + 1], config_.depth);
      squares[t + 1] = squares[t] + expanded;
      begin_[t + 1] += begin_[t];
    }
    places_.resize(begin_[row_tiles_]);
    constexpr int64_t kSquare = kTile * kMostDepth;
    auto* weights = static_cast<uint16_t*>(
        weight_scratch.at_least(squares[row_tiles_] * kSquare * sizeof(uint16_t)));
    weights_.resize(row_tiles_);
    parallel_ranges(team, row_tiles_, [&](int64_t begin, int64_t end) {
      LiveTiles live(w_, config_.depth);
      for (int64_t t = begin; t < end; ++t) {
        weights_[t] =
            place(live, live.find(t), places_.data() + begin_[t], weights + squares[t] * kSquare);
      }
    });
  }

  // Where the live tiles are that have just been found, and their weights, expanded into `memory`
  // if they have to be.
  const uint16_t* place(const LiveTiles& live, int64_t count, Place* places,
                        uint16_t* memory) const {
    live.places(places);
    if (in_place_) {
      live.locate_packed(places);
      return static_cast<const uint16_t*>(w_.values);
    }
    live.expand(count, memory);
    return memory;
  }

  SlabPanel empty_panel(const Strip& strip, int64_t first_group, int64_t groups) const {
    SlabPanel panel = slab_panel(s_, config_, strip.images, strip.rows, strip.width, groups);
    panel.first_group = first_group;
    if (config_.in_place && strip.width % kTile == 0) {
      panel.data = static_cast<const uint16_t*>(args_.x) + first_group * w_.group_in +
                   strip.column * s_.in_channels;
      panel.slab_stride = config_.depth;
      panel.pixel_stride = s_.in_channels;
      panel.packed = strip.width;
      return panel;
    }
    panel.memory = static_cast<uint16_t*>(
        panel_scratch.at_least(panel_size(s_, panel) * static_cast<int64_t>(sizeof(uint16_t))));
    panel.data = panel.memory;
    return panel;
  }

  // Where each tap begins in the panel.
  std::vector<int64_t> taps(const SlabPanel& panel) const {
    std::vector<int64_t> at;
    for (int64_t tap = 0; tap < w_.taps; ++tap) {
      const int64_t kd = tap / (s_.kernel[1] * s_.kernel[2]);
      const int64_t kh = tap / s_.kernel[2] % s_.kernel[1], kw = tap % s_.kernel[2];
      const int64_t plane_h = panel.own_rows ? kh : phase(s_, 1, kh);
      const int64_t plane_w = panel.own_columns ? kw : phase(s_, 2, kw);
      const int64_t plane = (kd * panel.planes_h + plane_h) * panel.planes_w + plane_w;
      const int64_t row = panel.own_rows ? 0 : shift(s_, 1, kh);
      const int64_t column = panel.own_columns ? 0 : shift(s_, 2, kw);
      at.push_back(plane * panel.plane_stride() +
                   (row * panel.images * panel.pitch + column) * panel.depth);
    }
    return at;
  }

  TileTask task_of(const Strip& strip, SlabPanel& panel, bool split) const {
    const int64_t image_stride = s_.out_pixels() * s_.out_channels;
    auto* out = static_cast<uint16_t*>(args_.out) + first_of(s_, strip);
    return {nullptr,
            0,
            in_place_ ? 4 * w_.rows : 4 * kTile,
            split,
            &s_,
            args_.x,
            &panel,
            strip,
            image_stride,
            s_.out[2] * s_.out_pixel_stride(),
            s_.out_pixel_stride(),
            s_.out_channel_stride(),
            {args_.bias, args_.activation, out, 0, s_.out_channels,
             residual_offset(args_.residual, args_.out)}};
  }

  RowTile row_tile(int64_t t, const uint16_t* weights, const LiveTile* tiles, int64_t count) const {
    const int64_t in_group = t % of_group_ * kTile;
    return {weights, tiles, count, t / of_group_ * w_.group_out + in_group,
            std::min<int64_t>(kTile, w_.group_out - in_group)};
  }

  bool run_strip(const Strip& strip, int64_t begin, int64_t end, bool split) const {
    const int64_t first_group = begin / of_group_;
    SlabPanel panel = empty_panel(strip, first_group, ceil_div(end, of_group_) - first_group);
    const std::vector<int64_t> tap_at = taps(panel);
    std::vector<LiveTile> tiles(begin_[end] - begin_[begin]);
    std::vector<RowTile> row_tiles;
    row_tiles.reserve(end - begin);
    LiveTile* at = tiles.data();
    for (int64_t t = begin; t < end; ++t) {
      const int64_t count = begin_[t + 1] - begin_[t];
      row_tiles.push_back(row_tile(t, weights_[t], at, count));
      at = locate(panel, tap_at, t, places_.data() + begin_[t], count, at);
    }
    TileTask task = task_of(strip, panel, split);
    task.row_tiles = row_tiles.data();
    task.count = end - begin;
    return multiply_tiles_amx(task);
  }

  LiveTile* locate(const SlabPanel& panel, const std::vector<int64_t>& tap_at, int64_t t,
                   const Place* places, int64_t count, LiveTile* to) const {
    const int64_t first_slab = (t / of_group_ - panel.first_group) * panel.slabs;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slab = first_slab + places[i].slab;
      *to++ = {tap_at[places[i].tap] + slab * panel.slab_stride, places[i].weights};
    }
    return to;
  }

  // The same, with some tiles of outputs at a time.
  bool run_alone(const Strip& strip, int64_t begin, int64_t end, bool split) const {
    constexpr int64_t kAtOnce = 4;
    const int64_t first_group = begin / of_group_;
    SlabPanel panel = empty_panel(strip, first_group, ceil_div(end, of_group_) - first_group);
    const std::vector<int64_t> tap_at = taps(panel);
    TileTask task = task_of(strip, panel, split);
    LiveTiles live(w_, config_.depth);
    const int64_t most = w_.taps * ceil_div(w_.group_in, config_.depth);
    const int64_t weight_size = LiveTiles::squares(most, config_.depth) * kTile * kMostDepth;
    auto* weights = static_cast<uint16_t*>(own_weight_scratch.at_least(
        kAtOnce * weight_size * static_cast<int64_t>(sizeof(uint16_t))));
    std::vector<LiveTile> tiles(kAtOnce * most);
    std::vector<Place> places(most);
    RowTile row_tiles[kAtOnce];
    task.row_tiles = row_tiles;
    for (int64_t first = begin; first < end; first += kAtOnce) {
      task.count = std::min(kAtOnce, end - first);
      for (int64_t i = 0; i < task.count; ++i) {
        const int64_t count = live.find(first + i);
        const uint16_t* from = place(live, count, places.data(), weights + i * weight_size);
        row_tiles[i] = row_tile(first + i, from, tiles.data() + i * most, count);
        locate(panel, tap_at, first + i, places.data(), count, tiles.data() + i * most);
      }
      if (!multiply_tiles_amx(task)) return false;
    }
    return true;
  }

  const ConvArgs& args_;
  const Weight& w_;
  const ConvShape& s_;
  const TileConfig& config_;
  int64_t of_group_, row_tiles_;  // tiles of outputs
  bool in_place_;                 // the weights are read where they lie
  std::vector<int64_t> begin_;    // of each among the live tiles
  std::vector<Place> places_;     // of the live tiles
  std::vector<const uint16_t*> weights_;
};

}  // namespace

bool conv_tiles(const ConvArgs& args) {
  const ConvShape s = collapsed(args.shape);
  const TileConfig config = choose_tile_config(s, args.weight, l2_bytes(), args.threads);
  return Convolution(args, s, config).run();
}

}  // namespace gossamer::blocksparse
