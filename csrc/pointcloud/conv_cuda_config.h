#pragma once
// How a convolution over voxels is cut up on a GPU: a pure function of sizes and device.
#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace gossamer::pointcloud {

// mma: bfloat16 and float16 by tensor cores. fma: exact float32, without them. grouped: whatever is
// in groups, in float32 too.
enum class CudaConvKernel : uint8_t { kMma, kFma, kGrouped };

static constexpr const char* name(CudaConvKernel kernel) {
  switch (kernel) {
    case CudaConvKernel::kMma: return "mma";
    case CudaConvKernel::kFma: return "fma";
    case CudaConvKernel::kGrouped: return "grouped";
  }
  return "?";
}

// Positions that share a list of taps, and how many each of its four bits stands for.
constexpr int kGroupRows = 128, kQuarterRows = 32, kQuarters = kGroupRows / kQuarterRows;

// What a thread block of the mma kernel computes, and how its warps share it: each takes a quarter
// of a group.
struct ConvTile {
  int rows, outputs;  // of the tile
  int warps_w;        // along the outputs
  int stages;         // in shared memory: one is multiplied, the others are on their way
  int resident;       // blocks that a multiprocessor has registers for
  constexpr int warps_x() const { return rows / kQuarterRows; }
  constexpr int warps() const { return warps_x() * warps_w; }
};

// The first reads the fewest bytes for a product. The last is for few outputs, of which the others
// would be mostly padding, or would leave most multiprocessors idle.
constexpr ConvTile kConvTiles[] = {
    {128, 128, 2, 4, 2},
    {128, 64, 1, 4, 4},
    {64, 32, 2, 5, 6},
};
constexpr int kConvTileCount = sizeof(kConvTiles) / sizeof(ConvTile);
constexpr int kStageChannels = 32;  // 64 bytes of every row

constexpr int kFmaRows = 64, kFmaOutputs = 64;

constexpr int64_t conv_shared_bytes(const ConvTile& tile) {
  return int64_t{tile.stages} * (tile.rows + tile.outputs) * kStageChannels * 2;
}

struct CudaConvConfig {
  CudaConvKernel kernel;
  int tile;  // mma: which of kConvTiles

  int rows() const { return kernel == CudaConvKernel::kMma ? kConvTiles[tile].rows : kFmaRows; }
  int outputs() const {
    return kernel == CudaConvKernel::kMma ? kConvTiles[tile].outputs : kFmaOutputs;
  }
  int64_t blocks(int64_t groups, int64_t c_out) const {
    return groups * (kGroupRows / rows()) * ceil_div(c_out, outputs());
  }
};

// A model of the time of a tap's 32 channels, times the rounds of thread blocks on the busiest
// multiprocessor, in its cycles:
//
//   bytes     of x and weights from the L2, kL2Bytes a cycle; what there is not is not read
//   products  with the tile's padding
//   stage     issued copies and a barrier, hidden by other blocks on the multiprocessor
//
// The rates are those of the block-sparse kernels' model (blocksparse/conv_cuda_config.h).
struct ConvModel {
  static constexpr double kL2Bytes = 32, kProducts = 1024, kStageCycles = 300;

  int64_t groups, c_out;
  const CudaDevice& device;

  double cost(int index) const {
    const ConvTile& tile = kConvTiles[index];
    const auto columns = static_cast<double>(ceil_div(c_out, tile.outputs));
    const double bytes = 2.0 * kStageChannels * (tile.rows + static_cast<double>(c_out) / columns);
    const double products = 1.0 * kStageChannels * tile.rows * tile.outputs;
    const double busy = std::max(bytes / kL2Bytes, products / kProducts);
    const CudaConvConfig config{CudaConvKernel::kMma, index};
    const int64_t rounds = ceil_div(config.blocks(groups, c_out), device.multiprocessors);
    const int64_t fit = std::max<int64_t>(device.shared_bytes / conv_shared_bytes(tile), 1);
    const auto together =
        static_cast<double>(std::min<int64_t>({rounds, fit, int64_t{tile.resident}}));
    return static_cast<double>(rounds) * std::max(busy, (busy + kStageCycles) / together);
  }
};

inline CudaConvConfig choose_cuda_conv_config(DType dtype, int64_t groups, int64_t c_out,
                                              const CudaDevice& device) {
  if (size_of(dtype) != 2) return {CudaConvKernel::kFma, 0};
  const ConvModel model{std::max<int64_t>(groups, 1), c_out, device};
  int best = -1;
  double least = 0;
  for (int i = 0; i < kConvTileCount; ++i) {
    if (conv_shared_bytes(kConvTiles[i]) > device.shared_bytes) continue;
    const double cost = model.cost(i);
    if (best < 0 || cost < least) best = i, least = cost;
  }
  return {CudaConvKernel::kMma, best};
}

}  // namespace gossamer::pointcloud
