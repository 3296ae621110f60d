// Cuts a 2:4 convolution into strips of pixels, those into tiles, and hands them to the kernels of
// the target in force. Strips, their planes of x and what becomes of the sums are those of
// blocksparse.
#include "sparse24/conv.h"

#include <vector>

#include "blocksparse/conv_strips.h"
#include "common/cache_size.h"
#include "common/scratch.h"
#include "sparse24/conv_config.h"
#include "sparse24/conv_pairs.h"

namespace gossamer::sparse24 {
namespace {

using blocksparse::BatchTask;
using blocksparse::ConvConfig;
using blocksparse::Panel;
using blocksparse::Strip;

thread_local Scratch plane_scratch, tile_scratch, weight_scratch;

struct Units {
  void (*pairs)(const PairsTask& task);
  const blocksparse::Unit* ends;  // packs x and finishes y
};

Units units_of([[maybe_unused]] Target target, [[maybe_unused]] DType dtype) {
#ifdef GOSSAMER_X86
  if (target == Target::kAVX512) return {pairs_avx512, blocksparse::unit_of(target, dtype)};
  if (target == Target::kAVX2) return {pairs_avx2, blocksparse::unit_of(target, dtype)};
#endif
  return {nullptr, nullptr};
}

class Conv {
 public:
  Conv(const ConvArgs& args, const Units& units)
      : args_(args),
        units_(units),
        s_(blocksparse::collapsed(args.shape)),
        pairs_(pair_shape(s_)),
        config_(choose_pair_strips(s_, units.ends->lanes, l1_bytes(), l2_bytes(), args.threads)) {}

  void run() {
    words_ = args_.weight.panels;
    if (words_ == nullptr) {
      auto* words = static_cast<uint32_t*>(weight_scratch.at_least(4 * pairs_.most_words()));
      to_pairs(args_.weight, pairs_, words, config_.threads);
      words_ = words;
    }
    groups_ = pass_groups(pairs_);
    for_each_strip(s_, config_, [&](const Strip& strip, int64_t part) {
      run_strip(strip, pairs_.blocks() * part / config_.parts,
                pairs_.blocks() * (part + 1) / config_.parts);
    });
  }

 private:
  // The outputs of the blocks [begin, end).
  void run_strip(const Strip& strip, int64_t begin, int64_t end) {
    const int64_t lanes = units_.ends->lanes, first_group = begin / pairs_.group_blocks();
    const int64_t groups = ceil_div(end, pairs_.group_blocks()) - first_group;
    Panel planes = blocksparse::panel_of(s_, strip.images, strip.rows, strip.width,
                                         groups * s_.group_in(), lanes, 1);
    planes.first_channel = first_group * s_.group_in();
    planes.data = static_cast<float*>(
        plane_scratch.at_least(4 * blocksparse::planes(s_, planes) * planes.plane_stride));
    blocksparse::pack_panel(s_, args_.x, units_.ends->pixel_lanes.pack, strip, planes);

    const std::vector<int64_t> columns = columns_in(planes);
    // The columns of the planes past the strip's are no outputs, and the last row's need no sums.
    const int64_t last_row = (strip.images - 1) * planes.image_rows + strip.rows - 1;
    const int64_t pixels = last_row * planes.pitch + strip.width;
    const int64_t vectors = ceil_div(pixels, lanes);
    const TileConfig tile = choose_tile(vectors, lanes, l1_bytes());
    for (int64_t at = 0, tiles = tile.tiles; tiles > 0; --tiles) {
      const int64_t size = ceil_div(vectors - at, tiles);
      for (int64_t block = begin; block < end;) {
        const int64_t group_end = (block / pairs_.group_blocks() + 1) * pairs_.group_blocks();
        const int64_t stop = std::min({end, group_end, block + tile.outputs / kBlockN});
        run_tile(strip, planes, columns, at * lanes, size, pixels, block, stop);
        block = stop;
      }
      at += size;
    }
  }

  // Of every column of the passes, where the strip's first pixel meets it; -1 in padding.
  std::vector<int64_t> columns_in(const Panel& planes) const {
    const std::vector<int64_t> taps = blocksparse::taps_in(s_, planes);
    std::vector<int64_t> columns;
    for (const int64_t group : groups_) {
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t channel = group % pairs_.tap_groups() * 4 + i;
        const bool there = group >= 0 && channel < s_.group_in();
        columns.push_back(there ? taps[group / pairs_.tap_groups()] + channel * planes.slab_stride
                                : -1);
      }
    }
    return columns;
  }

  // `size` registers of pixels from pixel q on, and the outputs of some blocks of one group.
  void run_tile(const Strip& strip, const Panel& planes, const std::vector<int64_t>& columns,
                int64_t q, int64_t size, int64_t pixels, int64_t block, int64_t stop) {
    const Weight& w = args_.weight;
    const int64_t tile_pixels = size * units_.ends->lanes;
    const int64_t panel_floats = kPanelColumns * tile_pixels;
    // finish() reads, and ignores, up to a square past the last output.
    const int64_t sum_floats =
        ((stop - block) * kBlockN + blocksparse::kSquareOutputs) * tile_pixels;
    auto* panel = static_cast<float*>(tile_scratch.at_least(4 * (panel_floats + sum_floats)));
    float* sums = panel + panel_floats;
    const int64_t group = block / pairs_.group_blocks(),
                  in_group = block % pairs_.group_blocks() * kBlockN;
    const float* x =
        planes.data + (group * s_.group_in() - planes.first_channel) * planes.slab_stride + q;
    const int64_t output = group * s_.group_out() + in_group, bytes = size_of(w.dtype);
    const int64_t first = first_of(s_, strip) + output * s_.out_channel_stride();
    const auto* bias = static_cast<const char*>(args_.bias);
    BatchTask task{};
    task.outputs = std::min((stop - block) * kBlockN, s_.group_out() - in_group);
    task.images = strip.images, task.image_rows = planes.image_rows, task.rows = strip.rows;
    task.pitch = planes.pitch, task.width = strip.width;
    task.tile = tile_pixels, task.sums = sums;
    task.channels_last = s_.channels_last;
    task.image_stride = s_.out_pixels() * s_.out_channels;
    task.epilogue = {bias == nullptr ? nullptr : bias + output * bytes,
                     args_.activation,
                     static_cast<char*>(args_.out) + first * bytes,
                     s_.channels_last ? s_.out_pixel_stride() : s_.out_channel_stride(),
                     s_.out_channels - output,
                     residual_offset(args_.residual, args_.out)};
    const int64_t pixel = s_.out_pixel_stride() * bytes, channel = s_.out_channel_stride() * bytes;
    // Where rows have columns that are no outputs, what is fetched is near.
    const char* y = static_cast<const char*>(task.epilogue.out) + q * pixel;
    const Lines lines = s_.channels_last ? Lines{y, tile_pixels, task.outputs * bytes, pixel}
                                         : Lines{y, task.outputs, tile_pixels * bytes, channel};
    units_.pairs({words_, pairs_.blocks(), block, stop - block, pairs_.passes(), columns.data(), x,
                  static_cast<int>(size), panel, sums, lines, x_ahead(strip)});
    units_.ends->finish(task, q, std::min(q + tile_pixels, pixels));
  }

  // Where every strip is one tile of a row.
  Lines x_ahead(const Strip& strip) const {
    const int64_t lanes = units_.ends->lanes;
    if (!blocksparse::is_row(s_) || config_.strip_width > most_tile(lanes, l1_bytes()) * lanes)
      return {};
    const int64_t columns = ceil_div(s_.out[2], config_.strip_width);
    const int64_t next =
        strip.image * columns + strip.column / config_.strip_width + config_.threads;
    const int64_t column = next % columns * config_.strip_width;
    const int64_t width = std::min(config_.strip_width, s_.out[2] - column);
    if (next / columns >= s_.batch) return {};
    const int64_t bytes = size_of(args_.weight.dtype), pixel = s_.in_pixel_stride() * bytes;
    const char* x = static_cast<const char*>(args_.x) +
                    next / columns * s_.in_pixels() * s_.in_channels * bytes + column * pixel;
    return s_.channels_last
               ? Lines{x, width, pixel, pixel}
               : Lines{x, s_.in_channels, width * bytes, s_.in_channel_stride() * bytes};
  }

  const ConvArgs& args_;
  const Units& units_;
  const ConvShape s_;
  const PairShape pairs_;
  const ConvConfig config_;
  const uint32_t* words_ = nullptr;
  std::vector<int64_t> groups_;  // of the passes
};

}  // namespace

void conv(const ConvArgs& args) {
  if (args.shape.batch * args.shape.out_pixels() == 0) return;
  const Target target = conv_target(gossamer::target());
  const Units units = units_of(target, args.weight.dtype);
  if (units.ends != nullptr) return Conv(args, units).run();
  const Weight& w = args.weight;
  if (w.panels == nullptr) return conv_serial(args);
  std::vector<char> values(w.n * w.value_columns() * size_of(w.dtype));
  std::vector<uint8_t> indices(w.n * w.index_bytes());
  from_pairs(w.panels, pair_shape(args.shape), w, values.data(), indices.data());
  ConvArgs portable = args;
  portable.weight = {w.dtype, w.n, w.k, values.data(), indices.data(), nullptr};
  conv_serial(portable);
}

}  // namespace gossamer::sparse24
