#pragma once
// How a block-sparse product is cut up on a GPU: a pure function of shape, weight and device.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "blocksparse/blocksparse.h"
#include "common/ceil_div.h"
#include "common/cuda.h"

namespace gossamer::blocksparse {

// mma: bfloat16 and float16 by tensor cores.
// fma: exact float32, and float64, without them.
enum class CudaConvKernel : uint8_t { kMma, kFma };

static constexpr const char* name(CudaConvKernel kernel) {
  return kernel == CudaConvKernel::kMma ? "mma" : "fma";
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

constexpr int64_t conv_shared_bytes(const ConvTile& tile) {
  const int64_t stages = int64_t{tile.stages} * (tile.pixels + tile.outputs) * kStageChannels * 2;
  return stages + tile.pixels * 24 + tile.stages * 16;  // where pixels lie; what is live
}

struct CudaConvConfig {
  CudaConvKernel kernel;
  int tile;  // mma: which of kConvTiles

  int tile_pixels() const {
    return kernel == CudaConvKernel::kMma ? kConvTiles[tile].pixels : kFmaPixels;
  }
  int tile_outputs() const {
    return kernel == CudaConvKernel::kMma ? kConvTiles[tile].outputs : kFmaOutputs;
  }
  // Rows that a block takes in a tile.
  int padded_rows(const Weight& w) const {
    return kernel == CudaConvKernel::kMma ? padded_size(w.rows) : fma_padded_rows(w.rows);
  }
  int64_t tiles_of_group(const Weight& w) const {
    return ceil_div(w.row_blocks(), tile_outputs() / padded_rows(w));
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

inline CudaConvConfig choose_cuda_conv_config(const ConvShape& s, const Weight& w,
                                              const CudaDevice& device) {
  if (size_of(w.dtype) != 2) return {CudaConvKernel::kFma, 0};
  const ConvModel model{s.batch * s.out_pixels(), w, device};
  int best = -1;
  double least = 0;
  for (int i = 0; i < kConvTileCount; ++i) {
    if (conv_shared_bytes(kConvTiles[i]) > device.shared_bytes) continue;
    const double cost = model.cost(i);
    if (best < 0 || cost < least) best = i, least = cost;
  }
  return {CudaConvKernel::kMma, best};
}

}  // namespace gossamer::blocksparse
