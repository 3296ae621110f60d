#pragma once
// What a thread block of the Hopper kernel (conv_sm90.cu) has in shared memory, and the warpgroup
// that fills it.
#include "blocksparse/conv_sm90_plan.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ring.cuh"

namespace gossamer::blocksparse {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
// A multiprocessor has 512 registers for every four warps, one in each warpgroup: 2 x 216 + 72.
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;

constexpr int kPixels = kWgmmaPixels, kOutputs = kWgmmaOutputs;
constexpr int kHalfPixels = kPixels / 2;  // the M of wgmma
constexpr int kWarpPixels = 16;
constexpr int kQuarters = kStageChannels / kGranule;  // of a step, the depth of a product each
constexpr int kPieces = kStageChannels / 8;           // of 16 bytes, of a pixel
constexpr int kXBytes = kPixels * kStageChannels * 2;
constexpr int kStages = 4;  // 48 KB each: one is multiplied while 70 KB or so are on their way

constexpr int kPassOutputs = 32;              // that leave by shared memory at a time
constexpr int kSumStride = kPassOutputs + 8;  // so that lanes write to different banks
constexpr int kWarpSums = kWarpPixels * kSumStride;
constexpr int kProducerBarrier = 1;

// Granules of kSize x kSize.
template <int kSize>
struct Granules {
  static constexpr bool kSplitOutputs = kSize == 16;     // among warpgroups, otherwise pixels
  static constexpr int kDepth = kSize / 16;              // of a product, in quarters
  static constexpr int kHalves = kSplitOutputs ? 2 : 1;  // of the pixels, that a warpgroup has
  static constexpr int kCount = kOutputs / kSize / kHalves;
  static constexpr int kBytes = kSize * kStageChannels * 2;  // of one over a whole step
  using Sums = float[kHalves][kCount][kSize / 2];

  // The first of this warpgroup's, and how many outputs it has.
  __device__ static int first(int outputs) {
    // By a shuffle, so that the compiler knows it to be the same for a whole warp.
    const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    return kSplitOutputs ? warpgroup * (outputs / kSize / 2) : 0;
  }
  // Of the tile, the first of this warp's pixels in a half.
  __device__ static int pixel(int half) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    return kSplitOutputs ? half * kHalfPixels + warp % 4 * kWarpPixels : warp * kWarpPixels;
  }
};

struct Stage {
  SharedTile<uint4, kPixels * kPieces, 1024> x;  // [pixel][piece p at p xor (pixel mod 8)]
  // [granule][block column][output][channel], swizzled over the bytes that a block's row has
  SharedTile<uint16_t, kOutputs * kStageChannels, 1024> weights;
};

// Of a stage: 16 bits a quarter, those of the granules that are live; whether it is a tile's last.
struct alignas(16) Header {
  uint32_t low, high;  // of the quarters 0 and 1, and of 2 and 3
  uint32_t last, unused;
};

struct Shared {
  Stage stages[kStages];
  SharedTile<float, kConsumerWarps * kWarpSums> sums;
  Plan plan;
  SharedTile<Position, kPixels> positions;
  SharedTile<int64_t, kPixels> offsets;
  Header headers[kStages];
  uint64_t full[kStages];   // the bytes that arrive, and what the producer copies
  uint64_t empty[kStages];  // the consumers' warps that have let go
};

struct Args {
  TensorMap x_map, weights_map;
  ConvLayout layout;
  unsigned groups, tiles;  // tiles: of a cluster, which count as one
  Steps steps;
  const uint16_t* x;
  const void *bias, *residual;
  void* out;
  Activation activation;
  bool x_by_tma;
  int cluster;    // blocks of it
  int outputs;    // of a tile
  int log2_cols;  // of a block
};

__device__ __forceinline__ OutputTile tile_of(const Args& args, unsigned number) {
  const auto cluster = static_cast<unsigned>(args.cluster);
  return {args.layout, args.groups, kPixels, args.outputs, number * cluster + blockIdx.x % cluster};
}

// ---- the producer -------------------------------------------------------------------------------

template <int kSize>
class Producer {
 public:
  __device__ Producer(Shared& shared, const Args& args)
      : shared_(shared),
        args_(args),
        thread_(static_cast<int>(threadIdx.x) % kWarpgroup),
        warp_(thread_ / kWarp),
        lane_(thread_ % kWarp),
        rank_(static_cast<int>(blockIdx.x) % args.cluster),
        granules_of_row_(args.layout.rows / kSize) {}

  __device__ void run() {
    const unsigned clusters = gridDim.x / static_cast<unsigned>(args_.cluster);
    for (unsigned number = blockIdx.x / static_cast<unsigned>(args_.cluster); number < args_.tiles;
         number += clusters) {
      const OutputTile tile = tile_of(args_, number);
      plan(tile);
      if (warp_ > 0 && args_.x_by_tma) continue;
      Column at;
      unsigned inside = 0;
      int step = shared_.plan.next(args_.steps, 0);
      do {  // a tile without a live block has a step, too, that is empty
        const int following = step < 0 ? -1 : shared_.plan.next(args_.steps, step + 1);
        // The first round finds the stages empty: the phase before the first counts as ended.
        ptx::mbarrier_wait(&shared_.empty[ring_.stage], ring_.phase ^ 1);
        if (warp_ == 0) bring(tile, step, following < 0);
        if (!args_.x_by_tma) {
          if (step >= 0) copy_x(tile, step, at, inside);
          ptx::mbarrier_arrive_cp_async(&shared_.full[ring_.stage]);
        }
        ring_.advance();
        step = following;
      } while (step >= 0);
    }
  }

 private:
  // By all warps: what is live in the tile, and where its pixels are. A lane of the first warp
  // stands for a granule and gets the first block of its block row.
  __device__ void plan(const OutputTile& tile) {
    const ConvLayout& layout = args_.layout;
    const int rows = args_.outputs / layout.rows;  // block rows of a tile
    meet();                                        // nobody reads the last plan any more
    shared_.plan.clear(args_.steps, thread_, kWarpgroup);
    if (!args_.x_by_tma) {
      shared_.positions[thread_] =
          position_of(layout, tile.first_pixel + thread_, shared_.offsets.data() + thread_);
    }
    meet();
    // The blocks of a cluster visit the same steps: those in which one of them has a live block.
    const uint32_t of_row = (1u << granules_of_row_) - 1;
    const int first = tile.first_row - rank_ * rows;
    for (int i = warp_; i < rows * args_.cluster; i += kWarpgroup / kWarp) {
      if (first + i >= layout.row_blocks) break;
      const int mine = i - rank_ * rows;
      const bool here = mine >= 0 && mine < rows;
      shared_.plan.add(layout, args_.steps, int64_t{tile.group} * layout.row_blocks + first + i,
                       here ? of_row << (mine * granules_of_row_) : 0, lane_);
    }
    const int row = tile.first_row + lane_ / granules_of_row_;
    if (warp_ == 0 && lane_ < args_.outputs / kSize && row < layout.row_blocks) {
      block_ = layout.crow[int64_t{tile.group} * layout.row_blocks + row];
    }
    meet();
  }

  __device__ static void meet() {
    __syncwarp();
    ptx::barrier_sync(kProducerBarrier, kWarpgroup);
  }

  // By the first warp: weights, x where it comes by TMA, and what is live; `step` may be -1.
  __device__ void bring(const OutputTile& tile, int step, bool last) {
    Stage& stage = shared_.stages[ring_.stage];
    uint64_t* full = &shared_.full[ring_.stage];
    const int log2_parts = args_.steps.log2_parts, width = kQuarters >> log2_parts;
    uint32_t live[kQuarters];
    int granules = 0;
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      const int column = (step << log2_parts) + (i << log2_parts) / kQuarters;
      live[i] = step < 0 ? 0 : shared_.plan.of_column(column);
      granules += i % width == 0 ? __popc(static_cast<int>(live[i])) : 0;
    }
    const int column_bytes = Granules<kSize>::kBytes >> log2_parts;
    if (lane_ == 0) {
      shared_.headers[ring_.stage] = {live[0] | live[1] << kPlanBits,
                                      live[2] | live[3] << kPlanBits, last ? 1u : 0u, 0};
      const bool tiles = args_.x_by_tma && step >= 0;
      ptx::mbarrier_arrive_expect_tx(full, granules * column_bytes + (tiles ? kXBytes : 0));
      if (tiles) bring_x(tile, step, stage, full);
    }
    __syncwarp();
    // Each lane for its granule. A place past the last block, if indices are wrong, has zeros.
    const bool there = lane_ < args_.outputs / kSize;
    auto* to = reinterpret_cast<unsigned char*>(stage.weights.data()) +
               (there ? lane_ * Granules<kSize>::kBytes : 0);
    const int first_row = lane_ % granules_of_row_ * kSize;
#pragma unroll
    for (int i = 0; i < kQuarters; ++i) {
      if (!there || i % width != 0 || (live[i] >> (lane_ & 15) & 1) == 0) continue;
      ptx::tma_load_3d(to + i / width * column_bytes, &args_.weights_map, full, 0, first_row,
                       block_++);
    }
  }

  // Halves of the pixels: a cluster of two brings one each, to both its blocks.
  __device__ void bring_x(const OutputTile& tile, int step, Stage& stage, uint64_t* full) {
    const int channel = tile.group * args_.layout.group_in + step * kStageChannels;
    for (int half = rank_; half < 2; half += args_.cluster) {
      uint4* to = stage.x.data() + half * kHalfPixels * kPieces;
      const int pixel = static_cast<int>(tile.first_pixel) + half * kHalfPixels;
      if (args_.cluster == 1) {
        ptx::tma_load_2d(to, &args_.x_map, full, channel, pixel);
      } else {
        ptx::tma_load_2d_multicast(to, &args_.x_map, full, channel, pixel, 0b11);
      }
    }
  }

  // By all warps: x as the step's tap sees it. Eight threads copy the 128 bytes of a pixel.
  __device__ void copy_x(const OutputTile& tile, int step, Column& at, unsigned& inside) {
    constexpr int kRows = kWarpgroup / kPieces;  // from a thread's pixel to its next
    const ConvLayout& layout = args_.layout;
    const int tap = step / args_.steps.of_tap, chunk = step - tap * args_.steps.of_tap;
    const int column = tap * layout.col_blocks + (chunk << args_.steps.log2_parts);
    const int piece = thread_ % kPieces, first = thread_ / kPieces;
    if (at.move_to(layout, tile.group, column)) {
      inside = 0;
#pragma unroll 1
      for (int i = 0; i < kPixels / kRows; ++i) {
        if (at.sees(layout, shared_.positions[first + i * kRows])) inside |= 1u << i;
      }
    }
    // Past the group's last channel there are zeros.
    const int bytes = 2 * min(max(layout.group_in - at.channel - 8 * piece, 0), 8);
    const int64_t offset = at.offset + 8 * piece;
    uint4* to = shared_.stages[ring_.stage].x.data() + first * kPieces + (piece ^ first % 8);
#pragma unroll 4
    for (int i = 0; i < kPixels / kRows; ++i) {
      const bool there = bytes > 0 && (inside >> i & 1) != 0;
      const int64_t from = there ? shared_.offsets[first + i * kRows] + offset : 0;
      ptx::cp_async16(to + i * kRows * kPieces, args_.x + from, there ? bytes : 0);
    }
  }

  Shared& shared_;
  const Args& args_;
  int thread_, warp_, lane_, rank_, granules_of_row_;
  int block_ = 0;  // of this lane's block row, the next one
  Ring<kStages> ring_;
};

}  // namespace
}  // namespace gossamer::blocksparse
