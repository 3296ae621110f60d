#pragma once
// How a block-sparse product is cut up on a GPU: a pure function of shape, weight and device.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "blocksparse/blocksparse.h"
#include "common/ceil_div.h"
#include "common/cuda.h"

namespace gossamer::blocksparse {

// mma:   bfloat16 and float16 by tensor cores.
// fma:   exact float32, and float64, without them.
// wgmma: mma with Hopper's instructions, for large blocks and channels that lie side by side.
enum class CudaConvKernel : uint8_t { kMma, kFma, kWgmma };

static constexpr const char* name(CudaConvKernel kernel) {
  switch (kernel) {
    case CudaConvKernel::kMma: return "mma";
    case CudaConvKernel::kFma: return "fma";
    case CudaConvKernel::kWgmma: return "wgmma";
  }
  return "?";
}

// What a thread block of the mma kernel computes, and how its warps share it.
struct ConvTile {
  int pixels, outputs;   // of the tile
  int warps_x, warps_w;  // along pixels and along outputs
  int stages;            // in shared memory: one is multiplied, the others are on their way
  int resident;          // blocks that a multiprocessor has registers for
  constexpr int warps() const { return warps_x * warps_w; }
};

// The largest two read the fewest bytes for a product. The last is for a few rows of x, where the
// weights have to come fast: many blocks, each with many bytes on their way.
constexpr ConvTile kConvTiles[] = {
    {128, 256, 2, 4, 3, 1}, {256, 128, 4, 2, 3, 1}, {128, 64, 4, 1, 3, 3},
    {64, 64, 2, 2, 4, 4},   {16, 64, 1, 4, 6, 5},
};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(ConvTile);

// Blocks lie in tiles as if they had a power of two of rows and columns, at least a fragment's 16.
constexpr int kGranule = 16;
constexpr int padded_size(int64_t size) {
  int padded = kGranule;
  while (padded < size) padded *= 2;
  return padded;
}

constexpr int kStageChannels = 64;  // 128 bytes of every pixel and every output

// The fma kernel has one tile, in which a block's rows are as if they were a multiple of a
// thread's.
constexpr int kFmaPixels = 64, kFmaOutputs = 64;
constexpr int kFmaGranule = 4;
constexpr int fma_padded_rows(int64_t rows) {
  return static_cast<int>(ceil_div(rows, kFmaGranule)) * kFmaGranule;
}

// A tile of the wgmma kernel: so many outputs by kWgmmaPixels. Fewer outputs are for products that
// would leave multiprocessors idle; a cluster is blocks that share their x.
struct WgmmaTile {
  int outputs, cluster;
};
constexpr WgmmaTile kWgmmaTiles[] = {{256, 2}, {256, 1}, {128, 1}, {64, 1}};
constexpr int kWgmmaTileCount = sizeof(kWgmmaTiles) / sizeof(WgmmaTile);
constexpr int kWgmmaPixels = 128, kWgmmaOutputs = 256;
constexpr int kWgmmaColumns = 2048;  // block columns that its shared memory has room for

inline int64_t wgmma_steps_of_tap(const Weight& w) { return ceil_div(w.group_in, kStageChannels); }
// With those that fill the last step of each tap up.
inline int64_t wgmma_columns(const Weight& w) {
  return w.taps * wgmma_steps_of_tap(w) * (kStageChannels / w.cols);
}

constexpr int64_t conv_shared_bytes(const ConvTile& tile) {
  const int64_t stages = int64_t{tile.stages} * (tile.pixels + tile.outputs) * kStageChannels * 2;
  return stages + tile.pixels * 24 + tile.stages * 16;  // where pixels lie; what is live
}

struct CudaConvConfig {
  CudaConvKernel kernel;
  int tile;                // mma: which of kConvTiles, wgmma: of kWgmmaTiles
  int blocks_at_once = 0;  // wgmma: at most that many, each for one tile after another

  int tile_pixels() const {
    switch (kernel) {
      case CudaConvKernel::kMma: return kConvTiles[tile].pixels;
      case CudaConvKernel::kFma: return kFmaPixels;
      case CudaConvKernel::kWgmma: return kWgmmaPixels;
    }
    return 0;
  }
  int tile_outputs() const {
    switch (kernel) {
      case CudaConvKernel::kMma: return kConvTiles[tile].outputs;
      case CudaConvKernel::kFma: return kFmaOutputs;
      case CudaConvKernel::kWgmma: return kWgmmaTiles[tile].outputs;
    }
    return 0;
  }
  int cluster() const { return kernel == CudaConvKernel::kWgmma ? kWgmmaTiles[tile].cluster : 1; }
  // Rows that a block takes in a tile.
  int padded_rows(const Weight& w) const {
    return kernel == CudaConvKernel::kFma ? fma_padded_rows(w.rows) : padded_size(w.rows);
  }
  // Whole clusters of them.
  int64_t tiles_of_group(const Weight& w) const {
    const int rows = tile_outputs() / padded_rows(w) * cluster();
    return ceil_div(w.row_blocks(), rows) * cluster();
  }
  int64_t blocks(int64_t pixels, const Weight& w) const {
    return ceil_div(pixels, tile_pixels()) * w.groups * tiles_of_group(w);
  }
};

// A model of the time of the busiest multiprocessor, in its cycles. A tile visits each column in
// which one of its block rows has a live block, and reads x for it once; it pays for
//
//   bytes     of x and live weights from the L2, kL2Bytes a cycle
//   fragments of x and live weights from shared memory: x once for each warp along the outputs
//             that has something live in the column, weights once for each warp along the pixels
//   products  of the live blocks with their padding
//   stages    a barrier each, hidden by other blocks on the multiprocessor
struct ConvModel {
  static constexpr double kL2Bytes = 32;
  static constexpr double kSharedBytes = 128;
  static constexpr double kProducts = 1024;    // an A100's; a Hopper's mma does a quarter more
  static constexpr double kStageCycles = 300;  // loads are issued and a barrier is passed
  static constexpr double kTileCycles = 2500;  // to find the pixels, fill the pipeline, store

  int64_t pixels;
  const Weight& w;
  const CudaDevice& device;

  double density() const {
    return static_cast<double>(w.nnz) / static_cast<double>(w.block_rows() * w.block_columns());
  }
  // The share of columns that some of so many block rows have a live block in.
  double visited(double rows) const { return 1 - std::pow(1 - density(), std::max(rows, 1.0)); }

  double cost(int index) const {
    const CudaConvConfig config{CudaConvKernel::kMma, index};
    const ConvTile& tile = kConvTiles[index];
    const int rows = padded_size(w.rows), cols = padded_size(w.cols);
    const auto of_tile = static_cast<double>(tile.outputs / rows);
    const auto columns = static_cast<double>(w.block_columns());
    const double visits = columns * visited(of_tile), live = columns * density() * of_tile;
    const double warp_rows = static_cast<double>(tile.outputs / tile.warps_w) / rows;
    const double bytes = 2.0 * cols * (visits * tile.pixels + live * static_cast<double>(w.rows));
    const double fragments =
        2.0 * cols *
        (columns * visited(warp_rows) * tile.warps_w * tile.pixels + live * rows * tile.warps_x);
    const double products = live * rows * cols * tile.pixels;
    const double stages = visits * cols / kStageChannels;

    const int64_t rounds = ceil_div(config.blocks(pixels, w), device.multiprocessors);
    const int64_t fit = std::max<int64_t>(device.shared_bytes / conv_shared_bytes(tile), 1);
    const auto together =
        static_cast<double>(std::min<int64_t>({rounds, fit, int64_t{tile.resident}}));
    const double busy =
        std::max({bytes / kL2Bytes, fragments / kSharedBytes, products / kProducts});
    const double waiting = stages * kStageCycles + kTileCycles;
    return static_cast<double>(rounds) * std::max(busy, (busy + waiting) / together);
  }
};

// ---- wgmma (Hopper) -----------------------------------------------------------------------------

// Whether x can come in tiles.
inline bool sees_itself(const ConvShape& s, const Weight& w) {
  // A block may not reach into the channels of the next group: what is 0 there can be NaN in x.
  return s.is_pointwise() && (w.groups == 1 || w.group_in % w.cols == 0);
}

inline bool can_run_wgmma(int tile, const ConvShape& s, const Weight& w, const CudaDevice& device) {
  if (device.capability != 90 || tile < 0 || tile >= kWgmmaTileCount) return false;
  const auto is_size = [](int64_t size) { return size == 16 || size == 32 || size == 64; };
  const bool w_fits = size_of(w.dtype) == 2 && is_size(w.rows) && is_size(w.cols) && w.nnz > 0 &&
                      wgmma_columns(w) <= kWgmmaColumns;
  // x in pieces of 16 bytes, and coordinates of pixels in 32 bits.
  const bool x_fits = s.channels_last && s.in_channels % 8 == 0 && w.group_in % 8 == 0 &&
                      s.batch * s.out_pixels() <= int64_t{1} << 30 && s.batch * s.in_pixels() > 0;
  const int cluster = kWgmmaTiles[tile].cluster;
  return w_fits && x_fits && device.multiprocessors >= cluster &&
         (cluster == 1 || sees_itself(s, w));
}

// As above, for one step of 64 channels after the other. An estimate by arithmetic: no GPU has run
// the kernel yet.
struct WgmmaModel {
  static constexpr double kL2Bytes = 40;       // seen on an H200, by another kernel
  static constexpr double kProducts = 2048;    // at the full rate; of 16 outputs taken as half
  static constexpr double kBranch = 5;         // counted: cycles of a granule that is dead,
  static constexpr double kIssue = 25;         // and of one that is live
  static constexpr double kStepCycles = 140;   // a barrier, x from shared memory, draining
  static constexpr double kTileCycles = 4000;  // its plan, the end of its sums
  // An H200 took about so many times what the model says of the mma kernel.
  static constexpr double kMmaMeasured = 8;

  const ConvModel& shared;

  double cost(int index) const {
    const Weight& w = shared.w;
    const CudaConvConfig config{CudaConvKernel::kWgmma, index};
    const WgmmaTile& tile = kWgmmaTiles[index];
    const auto rows = static_cast<double>(tile.outputs / w.rows);
    const auto parts = static_cast<double>(kStageChannels / w.cols);
    const auto steps = static_cast<double>(w.taps * wgmma_steps_of_tap(w));
    const double visits = steps * shared.visited(rows * parts * tile.cluster);
    const double live = static_cast<double>(w.block_columns()) * shared.density() * rows;
    const auto block = static_cast<double>(w.rows * w.cols);
    const double bytes = 2 * (visits * kStageChannels * kWgmmaPixels / tile.cluster + live * block);
    const bool narrow = w.rows == 16 || w.cols == 16;
    const double products = live * block * kWgmmaPixels * (narrow ? 2 : 1);
    // A warpgroup branches around half of the granules of 16 x 16, or all of 32 x 32.
    const double granules = kStageChannels / (narrow ? 16 : 32) * tile.outputs / 32.0;
    const double live_granules = live * block / (narrow ? 2 * 16 * 16 : 32 * 32);
    const double issue =
        visits * (kStepCycles + granules * kBranch) + live_granules * (kIssue - kBranch);
    const int64_t tiles = config.blocks(shared.pixels, w) / tile.cluster;
    const int64_t rounds = ceil_div(tiles, shared.device.multiprocessors / tile.cluster);
    return static_cast<double>(rounds) *
           (std::max({bytes / kL2Bytes, products / kProducts, issue}) + kTileCycles);
  }
};

inline bool can_run(const CudaConvConfig& config, const ConvShape& s, const Weight& w,
                    const CudaDevice& device) {
  switch (config.kernel) {
    case CudaConvKernel::kMma:
      return size_of(w.dtype) == 2 &&
             conv_shared_bytes(kConvTiles[config.tile]) <= device.shared_bytes;
    case CudaConvKernel::kFma: return size_of(w.dtype) != 2;
    case CudaConvKernel::kWgmma: return can_run_wgmma(config.tile, s, w, device);
  }
  return false;
}

// Calls body(config) for every way to compute the product.
template <class Body>
void for_each_way(const ConvShape& s, const Weight& w, const CudaDevice& device, const Body& body) {
  const auto attempt = [&](const CudaConvConfig& config) {
    if (can_run(config, s, w, device)) body(config);
  };
  for (int i = 0; i < kConvTileCount; ++i) attempt({CudaConvKernel::kMma, i});
  attempt({CudaConvKernel::kFma, 0});
  for (int i = 0; i < kWgmmaTileCount; ++i) {
    attempt({CudaConvKernel::kWgmma, i, device.multiprocessors});
  }
}

// `aligned`: x and the values begin at multiples of 16 bytes, which the wgmma kernel needs.
inline CudaConvConfig choose_cuda_conv_config(const ConvShape& s, const Weight& w,
                                              const CudaDevice& device, bool aligned = true) {
  if (size_of(w.dtype) != 2) return {CudaConvKernel::kFma, 0};
  const ConvModel model{s.batch * s.out_pixels(), w, device};
  CudaConvConfig best{CudaConvKernel::kFma, 0};
  double least = std::numeric_limits<double>::infinity();
  for_each_way(s, w, device, [&](const CudaConvConfig& config) {
    if (config.kernel == CudaConvKernel::kFma) return;
    const bool hopper = config.kernel == CudaConvKernel::kWgmma;
    if (hopper && !aligned) return;
    const double cost = hopper ? WgmmaModel{model}.cost(config.tile)
                               : WgmmaModel::kMmaMeasured * model.cost(config.tile);
    if (cost < least) best = config, least = cost;
  });
  return best;
}

}  // namespace gossamer::blocksparse
