// Cuts the gradient of a weight into tasks and hands them to the kernels of the target in force.
#include <algorithm>
#include <vector>

#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_strips.h"
#include "blocksparse/dvalues_config.h"
#include "blocksparse/dvalues_unit.h"
#include "common/cache_size.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"

namespace gossamer::blocksparse {
namespace {

// So many pixels of dy of a block row stay in the L1 while all its blocks go over them.
constexpr int64_t kPixels = 256;

thread_local Scratch x_scratch, dy_scratch, sum_scratch;

const DvaluesUnit* dvalues_unit_in_force([[maybe_unused]] DType dtype) {
#ifdef GOSSAMER_X86
  if (target() >= Target::kAVX512) return dvalues_unit_avx512(dtype);
  if (target() == Target::kAVX2) return dvalues_unit_avx2(dtype);
#endif
  return nullptr;
}

// `count` things in parts of nearly one size, none of them much more than `most`.
int64_t step_of(int64_t count, int64_t most) {
  return ceil_div(count, ceil_div(count, std::max<int64_t>(most, 1)));
}

class Dvalues {
 public:
  Dvalues(const DvaluesArgs& args, const DvaluesUnit& unit)
      : args_(args),
        w_(args.weight),
        s_(collapsed(args.shape)),
        unit_(unit),
        config_(choose_dvalues_config(s_, w_, unit.lanes, l2_bytes(), args.threads)),
        rows_{w_.rows, unit.lanes},
        block_floats_(sums_of_block(w_, unit.lanes)),
        sums_(
            static_cast<float*>(sum_scratch.at_least(4 * config_.sums * w_.nnz * block_floats_))) {}

  void run() const {
    const int64_t tasks = config_.sums * config_.shares;
    parallel_run(static_cast<int>(std::min<int64_t>(config_.threads, tasks)),
                 [&](int thread, int team) {
                   for (int64_t t = thread; t < tasks; t += team) {
                     task(t % config_.sums, t / config_.sums);
                   }
                 });
    parallel_ranges(threads_for_bytes(args_.threads, 4 * config_.sums * w_.nnz * block_floats_),
                    w_.block_rows(), [&](int64_t begin, int64_t end) {
                      visit_floats(w_.dtype, [&]<class T>(T) { finish<T>(begin, end); });
                    });
  }

 private:
  // The first block row of a share, by the number of blocks.
  int64_t first_row(int64_t share) const {
    const int32_t* crow = w_.crow_indices;
    if (share == config_.shares) return w_.block_rows();
    return std::lower_bound(crow, crow + w_.block_rows(), w_.nnz * share / config_.shares) - crow;
  }

  void task(int64_t sum, int64_t share) const {
    const int64_t begin = first_row(share), end = first_row(share + 1);
    const int64_t first = w_.crow_indices[begin], last = w_.crow_indices[end];
    if (first == last) return;
    float* sums = sums_ + sum * w_.nnz * block_floats_;
    std::fill(sums + first * block_floats_, sums + last * block_floats_, 0.0f);
    const int64_t strips = strips_of(s_, config_);
    for (int64_t at = strips * sum / config_.sums; at < strips * (sum + 1) / config_.sums; ++at) {
      add_strip(strip_at(s_, config_, at), begin, end, sums);
    }
  }

  void add_strip(const Strip& strip, int64_t begin, int64_t end, float* sums) const {
    const int64_t lanes = unit_.lanes, first_group = begin / w_.row_blocks();
    const Slabs slabs =
        slabs_of(w_, first_group, ceil_div(end, w_.row_blocks()) - first_group, lanes);
    Panel panel = panel_of(s_, strip.images, strip.rows, strip.width,
                           slabs.groups * slabs.of_group() * lanes, lanes, lanes);
    panel.first_channel = first_group * w_.group_in;
    panel.data = static_cast<float*>(
        x_scratch.at_least(4 * (planes(s_, panel) * panel.plane_stride + lanes)));
    const auto pack = [&](const ConvShape& s, const void* x, const Strip& of, const Panel& to,
                          const int64_t (&offset)[3],
                          float* plane) { unit_.pack_x(s, x, of, to, slabs, offset, plane); };
    pack_panel(s_, args_.x, pack, strip, panel);
    const int64_t pixels = strip.images * strip.rows * strip.width, padded = rows_.padded();
    auto* dy = static_cast<float*>(dy_scratch.at_least(4 * (end - begin) * padded * pixels));
    unit_.pack_dy(s_, args_.dy, strip, rows_, begin, end, dy);

    const std::vector<int64_t> taps = taps_in(s_, panel);
    std::vector<int64_t> offsets;
    for (int64_t row = begin; row < end; ++row, dy += padded * pixels) {
      find_pieces(row, slabs, panel, taps, &offsets);
      if (offsets.empty()) continue;
      add_block_row(strip, panel, dy, offsets, sums + w_.crow_indices[row] * block_floats_);
    }
  }

  // Where the pieces of the blocks of a block row begin in the panel.
  void find_pieces(int64_t row, const Slabs& slabs, const Panel& panel,
                   const std::vector<int64_t>& taps, std::vector<int64_t>* offsets) const {
    const auto col_blocks = static_cast<uint32_t>(w_.col_blocks());
    const int64_t first_slab = (row / w_.row_blocks() - slabs.first_group) * slabs.of_group();
    offsets->clear();
    for (int64_t b = w_.crow_indices[row]; b < w_.crow_indices[row + 1]; ++b) {
      const auto column = static_cast<uint32_t>(w_.col_indices[b]);
      const uint32_t tap = column / col_blocks;
      const int64_t channel = (column - tap * col_blocks) * w_.cols;
      const int64_t slab = first_slab + channel / slabs.span * slabs.of_span();
      const int64_t at = taps[tap] + slab * panel.slab_stride + channel % slabs.span;
      for (int64_t c = 0; c < w_.cols; c += unit_.lanes) {
        offsets->push_back(at + c / unit_.lanes * panel.slab_stride);
      }
    }
  }

  void add_block_row(const Strip& strip, const Panel& panel, const float* dy,
                     const std::vector<int64_t>& offsets, float* sums) const {
    const int64_t pixels = strip.images * strip.rows * strip.width, lanes = unit_.lanes;
    const int64_t width = step_of(strip.width, kPixels);
    const int64_t rows = step_of(strip.rows, kPixels / strip.width);
    const int64_t images = step_of(strip.images, kPixels / (strip.rows * strip.width));
    for (int64_t image = 0; image < strip.images; image += images) {
      for (int64_t row = 0; row < strip.rows; row += rows) {
        for (int64_t column = 0; column < strip.width; column += width) {
          const int64_t at = (image * panel.image_rows + row) * panel.pitch + column;
          DvaluesPass pass{panel.data + at * lanes,
                           offsets.data(),
                           static_cast<int64_t>(offsets.size()),
                           nullptr,
                           std::min(images, strip.images - image),
                           std::min(rows, strip.rows - row),
                           std::min(width, strip.width - column),
                           panel.image_rows * panel.pitch * lanes,
                           panel.pitch * lanes,
                           0,
                           nullptr,
                           rows_.padded() * lanes};
          if (pass.length == panel.pitch) pass.length *= pass.rows, pass.rows = 1;
          const int64_t pixel = (image * strip.rows + row) * strip.width + column;
          for (int64_t r = 0; r < w_.rows; r += pass.part) {
            pass.part = rows_.part(r);
            pass.dy = dy + r * pixels + pixel * pass.part;
            pass.sums = sums + r * lanes;
            unit_.multiply(pass);
          }
        }
      }
    }
  }

  // The values of the blocks of the block rows [begin, end), from all sums; 0 in the padding.
  template <class T>
  void finish(int64_t begin, int64_t end) const {
    if constexpr (sizeof(T) <= sizeof(float)) {
      const int64_t lanes = unit_.lanes, col_blocks = w_.col_blocks();
      for (int64_t row = begin; row < end; ++row) {
        const int64_t rows = w_.group_out - row % w_.row_blocks() * w_.rows;
        for (int64_t b = w_.crow_indices[row]; b < w_.crow_indices[row + 1]; ++b) {
          const int64_t cols = w_.group_in - w_.col_indices[b] % col_blocks * w_.cols;
          const float* sums = sums_ + b * block_floats_;
          T* values = static_cast<T*>(args_.dvalues) + b * w_.rows * w_.cols;
          for (int64_t c = 0; c < w_.cols; c += lanes, sums += rows_.padded() * lanes) {
            const int64_t there = std::min(cols, w_.cols) - c, count = std::min(lanes, w_.cols - c);
            for (int64_t r = 0; r < w_.rows; ++r) {
              finish_piece(sums + r * lanes, r < rows ? there : 0, count, values + r * w_.cols + c);
            }
          }
        }
      }
    }
  }

  // Of `count` numbers the first `there` are sums.
  template <class T>
  void finish_piece(const float* sums, int64_t there, int64_t count, T* to) const {
    constexpr int64_t kMostLanes = 16;
    float total[kMostLanes] = {};
    for (int64_t i = 0; i < config_.sums; ++i, sums += w_.nnz * block_floats_) {
      for (int64_t c = 0; c < unit_.lanes; ++c) total[c] += sums[c];
    }
    for (int64_t c = 0; c < count; ++c) round_to(c < there ? total[c] : 0.0f, to[c]);
  }

  const DvaluesArgs& args_;
  const Weight& w_;
  const ConvShape s_;
  const DvaluesUnit& unit_;
  const DvaluesConfig config_;
  const Rows rows_;
  const int64_t block_floats_;
  float* const sums_;  // [sums][block][columns][rows][lane]
};

}  // namespace

void dvalues(const DvaluesArgs& args) {
  const DvaluesUnit* unit = dvalues_unit_in_force(args.weight.dtype);
  if (unit == nullptr || args.shape.batch * args.shape.out_pixels() == 0) {
    return dvalues_serial(args);
  }
  if (args.weight.nnz > 0) Dvalues(args, *unit).run();
}

}  // namespace gossamer::blocksparse
