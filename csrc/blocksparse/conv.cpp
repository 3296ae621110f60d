// Cuts a convolution into tasks and hands them to the kernels of the target in force.
#include <vector>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_config.h"
#include "blocksparse/conv_strips.h"
#include "blocksparse/conv_tiles.h"
#include "blocksparse/conv_tiles_config.h"
#include "blocksparse/conv_unit.h"
#include "common/cache_size.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace gossamer::blocksparse {
namespace {

thread_local Scratch panel_scratch, weight_scratch, sum_scratch;

// The chunks of consecutive block rows for the panel of one strip.
class Batch {
 public:
  // `weights` are those of all blocks, as the units' `expand` makes them.
  Batch(const Weight& weight, const float* weights, const ConvShape& shape, const Kernel& kernel)
      : weight_(weight), weights_(weights), shape_(shape), kernel_(kernel) {}

  // Block rows from `begin` on, up to `end`, until they give so many outputs; the first one after
  // them.
  int64_t fill(int64_t begin, int64_t end, int64_t most_outputs, const Panel& panel) {
    if (taps_.empty()) taps_ = taps_in(shape_, panel);
    chunks_.clear(), blocks_.clear();
    outputs_ = 0;
    int64_t block_row = begin;
    for (; block_row < end && outputs_ < most_outputs; ++block_row) {
      outputs_ += rows_of(block_row);
      add_blocks(block_row, panel);
    }
    const LiveBlock* blocks = blocks_.data();
    for (int64_t row = begin; row < block_row; ++row) {
      blocks = add_chunks(row, blocks);
    }
    return block_row;
  }

  int64_t outputs() const { return outputs_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }

 private:
  int64_t rows_of(int64_t block_row) const {
    const int64_t row = block_row % weight_.row_blocks() * weight_.rows;
    return std::min(weight_.rows, weight_.group_out - row);
  }

  void add_blocks(int64_t block_row, const Panel& panel) {
    const Weight& w = weight_;
    const int64_t first_channel = block_row / w.row_blocks() * w.group_in - panel.first_channel;
    const auto col_blocks = static_cast<uint32_t>(w.col_blocks());
    for (int64_t b = w.crow_indices[block_row]; b < w.crow_indices[block_row + 1]; ++b) {
      const auto column = static_cast<uint32_t>(w.col_indices[b]);
      const uint32_t tap = column / col_blocks;
      const int64_t in_group = (column - tap * col_blocks) * w.cols;
      const int64_t channel = first_channel + in_group;
      blocks_.push_back(
          {taps_[tap] + channel / panel.slab * panel.slab_stride + channel % panel.slab,
           std::min(w.cols, w.group_in - in_group)});
    }
  }

  const LiveBlock* add_chunks(int64_t block_row, const LiveBlock* blocks) {
    const Weight& w = weight_;
    const int64_t first = w.crow_indices[block_row], count = w.crow_indices[block_row + 1] - first;
    const float* weights = weights_ + first * w.rows * w.cols;
    for (int64_t r = 0, rows = rows_of(block_row); r < rows;) {
      const int64_t left = ceil_div(rows - r, kernel_.row_step) * kernel_.row_step;
      int chunk = kernel_.most_rows;
      while (chunk > left) chunk /= 2;
      const int outputs = static_cast<int>(std::min<int64_t>(chunk, rows - r));
      chunks_.push_back({chunk, outputs, weights + r, w.rows, w.rows * w.cols, blocks, count});
      r += chunk;
    }
    return blocks + count;
  }

  const Weight& weight_;
  const float* weights_;
  const ConvShape& shape_;
  const Kernel& kernel_;
  int64_t outputs_ = 0;
  std::vector<int64_t> taps_;  // where each begins in the panel
  std::vector<Chunk> chunks_;
  std::vector<LiveBlock> blocks_;
};

void conv_strip(const ConvArgs& args, const float* weights, const ConvShape& s, const Unit& unit,
                const ConvConfig& config, const Strip& strip, int64_t begin, int64_t end) {
  const Weight& w = args.weight;
  const int64_t first_group = begin / w.row_blocks();
  const int64_t groups = ceil_div(end, w.row_blocks()) - first_group;
  const Kernel& kernel = choose_kernel(s, w, unit);
  Panel panel = panel_of(s, strip.images, strip.rows, strip.width, groups * w.group_in, unit.lanes,
                         kernel.slab);
  panel.first_channel = first_group * w.group_in;
  int64_t pixel_stride = kernel.slab;
  const float* data;
  // Where x is the panel, a last tile of an odd number of pixels takes one before it.
  if (config.in_place && (strip.width % 2 == 0 || strip.width > kMostPixels)) {
    pixel_stride = s.in_channels;
    panel.slab_stride = kernel.slab;
    data = static_cast<const float*>(args.x) + strip.column * pixel_stride + panel.first_channel;
  } else {
    const int64_t floats = planes(s, panel) * panel.plane_stride + kMostPixels * kernel.slab;
    data = panel.data = static_cast<float*>(panel_scratch.at_least(4 * floats));
    pack_panel(s, args.x, kernel.pack, strip, panel);
  }

  const int64_t image_stride = s.out_pixels() * s.out_channels, first = first_of(s, strip);
  const int64_t size = size_of(w.dtype);
  Batch batch(w, weights, s, kernel);
  for (int64_t block_row = begin; block_row < end;) {
    const int64_t output =
        block_row / w.row_blocks() * w.group_out + block_row % w.row_blocks() * w.rows;
    block_row = batch.fill(block_row, end, config.batch_outputs, panel);
    const int64_t tile = config.tile_vectors * unit.lanes;
    // Lanes of outputs write theirs at once.
    const int64_t sums = kernel.row_step > 1 ? 0 : (batch.outputs() + kSquareOutputs) * tile;
    const auto* bias = static_cast<const char*>(args.bias);
    const Epilogue epilogue{
        bias == nullptr ? nullptr : bias + output * size,
        args.activation,
        static_cast<char*>(args.out) + (first + output * s.out_channel_stride()) * size,
        s.channels_last ? s.out_pixel_stride() : s.out_channel_stride(),
        s.out_channels - output,
        residual_offset(args.residual, args.out)};
    kernel.batch({batch.chunks().data(), static_cast<int64_t>(batch.chunks().size()),
                  batch.outputs(), data, panel.slab_stride, pixel_stride, strip.images,
                  panel.image_rows, strip.rows, panel.pitch, strip.width, tile,
                  static_cast<float*>(sum_scratch.at_least(4 * sums)), s.channels_last,
                  image_stride, epilogue});
  }
}

// All blocks as float32, each transposed; packed ones of float32 are just that.
const float* expanded(const Weight& w, const Unit& unit, int threads) {
  if (w.packed && w.dtype == DType::kFloat32) return static_cast<const float*>(w.values);
  const int64_t bytes = 4 * w.nnz * w.rows * w.cols;
  auto* weights = static_cast<float*>(weight_scratch.at_least(bytes));
  parallel_ranges(threads_for_bytes(threads, bytes), w.nnz,
                  [&](int64_t begin, int64_t end) { unit.expand(w, begin, end, weights); });
  return weights;
}

void conv_vectors(const ConvArgs& args, const Unit& unit) {
  const ConvShape s = collapsed(args.shape);
  const Weight& w = args.weight;
  const ConvConfig config = choose_conv_config(s, w, unit, l2_bytes(), args.threads);
  const float* weights = expanded(w, unit, config.threads);
  for_each_strip(s, config, [&](const Strip& strip, int64_t part) {
    conv_strip(args, weights, s, unit, config, strip, w.block_rows() * part / config.parts,
               w.block_rows() * (part + 1) / config.parts);
  });
}

}  // namespace

const Unit* unit_of([[maybe_unused]] Target target, [[maybe_unused]] DType dtype) {
#ifdef GOSSAMER_X86
  if (target == Target::kAVX512) return unit_avx512(dtype);
  if (target == Target::kAVX2) return unit_avx2(dtype);
#endif
  return nullptr;
}

std::pair<Target, const Unit*> unit_in_force(DType dtype) {
  const Target best = std::min(target(), Target::kAVX512);
  const Unit* unit = unit_of(best, dtype);
  return {unit == nullptr ? Target::kSerial : best, unit};
}

bool tiles_in_force(const Weight& weight) {
  return target() == Target::kAMXBF16 && tiles_win(weight);
}

void conv(const ConvArgs& args) {
  if (args.shape.batch * args.shape.out_pixels() == 0) return;
  const Unit* unit = unit_in_force(args.weight.dtype).second;
  if (unit == nullptr) return conv_serial(args);
#ifdef GOSSAMER_AMX
  if (tiles_in_force(args.weight) && conv_tiles(args)) return;
#endif
  conv_vectors(args, *unit);
}

}  // namespace gossamer::blocksparse
