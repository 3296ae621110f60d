// Block-sparse convolution of 16-bit floats on Hopper, for blocks of 16, 32 or 64 rows and columns
// and x with its channels last:
//
//   y[o, n] = act(sum over live (tap, c) of x[at(o, tap), c] W[n, tap, c] + b[n])
//
// A thread block computes tiles of 128 pixels x up to 256 outputs. Two warpgroups multiply, and a
// third fills a ring of steps: 64 channels of x, and the live weights of these.
//
//   granules of 32 x 32      a warpgroup has 64 pixels x all outputs
//   granules of 16 x 16      a warpgroup has all pixels x half of the outputs
//
// A block is one granule or several. Its place in a stage depends on where it lies in the step, not
// on what else is live, so that all sums and addresses are known when the code is compiled, and a
// granule that is dead costs a branch around its products. x is the left operand of wgmma, from
// registers, weights are the right one. Of 32 x 32 all products of a granule, 64 pixels and 32
// channels deep, are two instructions for one branch, and both warpgroups have the same to do; of
// 16 x 16 it takes all pixels to have two for one.
//
// Which blocks are live is read once for a tile (Plan). In a step in which something is, all 64
// channels of x are brought, by TMA where y's pixel i needs x's pixel i (linear layers, 1 x 1), by
// cp.async where taps lie apart; live blocks come by TMA, which lays them out for wgmma.
//
// By arithmetic, for a step of 128 x 256 with a quarter of its blocks live, in cycles:
//
//                          32 x 32   16 x 16
//   products                 256       256     at wgmma's full rate
//   L2                       614       614     16 KB of x, 8 KB of weights, at the 40 bytes a cycle
//                                              that it was seen to give a multiprocessor
//     in clusters            410       410     of two blocks with other outputs, which bring half
//     of
//                                              the pixels of x each and multicast them to both
//   shared memory            440       570     written; x by ldmatrix, weights by wgmma
//   branches, issues         380       600     10 a branch, 20 for products, 140 to meet and to
//   drain
//
// so it is bound by the L2. What wgmma takes for 16 and 32 outputs is not in there, and nothing of
// this has been measured. ptxas counts each product that is branched around as a group of its own,
// so a wait can only be for all: a warpgroup drains at each step, while the other one goes on.
#include <algorithm>

#include "blocksparse/conv_cuda.h"
#include "blocksparse/conv_sm90_plan.cuh"
#include "blocksparse/conv_store.cuh"
#include "common/check.h"
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
  const void* bias;
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
    const int rows = args_.outputs / layout.rows;     // block rows of a tile
    ptx::barrier_sync(kProducerBarrier, kWarpgroup);  // nobody reads the last plan any more
    shared_.plan.clear(args_.steps, thread_, kWarpgroup);
    if (!args_.x_by_tma) {
      shared_.positions[thread_] =
          position_of(layout, tile.first_pixel + thread_, shared_.offsets.data() + thread_);
    }
    ptx::barrier_sync(kProducerBarrier, kWarpgroup);
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
      ptx::tma_load_2d_multicast(stage.x.data() + half * kHalfPixels * kPieces, &args_.x_map, full,
                                 channel, static_cast<int>(tile.first_pixel) + half * kHalfPixels,
                                 static_cast<uint16_t>((1 << args_.cluster) - 1));
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

// ---- a consumer ---------------------------------------------------------------------------------

// Where the weights of a quarter lie in those of a granule, in the 16 bytes that descriptors count.
template <int kSize>
__device__ __forceinline__ uint32_t place_of_quarter(const Args& args, int quarter) {
  const int channel = quarter * kGranule, within = channel & ((1 << args.log2_cols) - 1);
  return static_cast<uint32_t>(((channel - within) * kSize + within) * 2 / 16);
}

// Issues the products of a step: sum[half][g] += x of these pixels times what granule g has.
template <class T, int kSize>
__device__ __forceinline__ void multiply(
    typename Granules<kSize>::Sums& sum,
    const uint32_t (&x)[Granules<kSize>::kHalves][kQuarters][4], const Args& args, uint64_t weights,
    const Header& header, int first) {
  using G = Granules<kSize>;
  const uint64_t upper = weights >> 32 << 32;
  const uint32_t lower =
      static_cast<uint32_t>(weights) + static_cast<uint32_t>(first * (G::kBytes / 16));
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; quarter += G::kDepth) {
    const uint32_t live =
        (quarter < 2 ? header.low : header.high) >> (quarter % 2 * kPlanBits + first);
    const uint32_t of_quarter = lower + place_of_quarter<kSize>(args, quarter);
#pragma unroll
    for (int g = 0; g < G::kCount; ++g) {
      if ((live >> g & 1) == 0) continue;
      // Without it ptxas puts its own in here, and runs the products one by one.
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < G::kDepth; ++i) {  // quarters of one block row's bytes lie side by side
        const uint64_t at = upper | (of_quarter + g * (G::kBytes / 16) + 2 * i);
#pragma unroll
        for (int half = 0; half < G::kHalves; ++half) {
          ptx::wgmma<T, kSize>(sum[half][g], x[half][quarter + i], at, true);
        }
      }
    }
  }
}

// Through shared memory from fragments, in which a lane's outputs lie 8 apart, to rows of them;
// each warp in a part of its own, 16 pixels and some outputs at a time.
template <class T, int kSize>
__device__ __forceinline__ void store(const float (&sum)[Granules<kSize>::kCount][kSize / 2],
                                      float* sums, const Args& args, const OutputTile& tile,
                                      int64_t first_pixel, int lane) {
  using G = Granules<kSize>;
  const int column = lane % 4 * kRun, first_output = G::first(args.outputs) * kSize;
#pragma unroll 1
  for (int first = 0; first < args.outputs / G::kHalves; first += kPassOutputs) {
    // Registers have to be named, so that all but one pass leave them alone.
#pragma unroll
    for (int j = 0; j < G::kCount * kSize / 8; ++j) {
      if (j / (kPassOutputs / 8) * kPassOutputs != first) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = j % (kSize / 8) * 4 + 2 * half;
        float* to = sums + (8 * half + lane / 4) * kSumStride + j % (kPassOutputs / 8) * 8;
        *reinterpret_cast<float2*>(to + lane % 4 * 2) =
            make_float2(sum[j * 8 / kSize][at], sum[j * 8 / kSize][at + 1]);
      }
    }
    __syncwarp();
    const StoredRun<T> run(tile.run(args.layout, first_output + first + column, kRun, args.outputs),
                           args.bias, args.activation);
#pragma unroll 1
    for (int row = lane / 4; row < kWarpPixels && run.count > 0; row += 8) {
      if (first_pixel + row >= args.layout.pixels) break;
      run.store(args.layout, args.out, first_pixel + row, sums + row * kSumStride + column);
    }
    __syncwarp();
  }
}

template <class T, int kSize>
__device__ void consume(Shared& shared, const Args& args) {
  using G = Granules<kSize>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_granule = G::first(args.outputs);
  const auto swizzle = static_cast<Swizzle>(args.log2_cols - 3);  // over a block's row
  const int eight_rows = (8 << args.log2_cols) * 2;
  const unsigned clusters = gridDim.x / static_cast<unsigned>(args.cluster);
  Ring<kStages> ring;
  for (unsigned number = blockIdx.x / static_cast<unsigned>(args.cluster); number < args.tiles;
       number += clusters) {
    typename G::Sums sum = {};
    bool last = false;
    while (!last) {
      ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
      Stage& stage = shared.stages[ring.stage];
      const Header header = shared.headers[ring.stage];
      uint32_t x[G::kHalves][kQuarters][4];
#pragma unroll
      for (int half = 0; half < G::kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < kQuarters; ++i) {
          // Lane 8m + r gives ldmatrix row r of matrix m: pixels 0-7 and 8-15 of piece 0, then 1.
          const uint4* row = stage.x.data() + (G::pixel(half) + lane % 16) * kPieces;
          ptx::ldmatrix(x[half][i], row + ((2 * i + lane / 16) ^ lane % 8));
        }
      }
      const uint64_t weights =
          ptx::matrix_descriptor(stage.weights.data(), swizzle, 16, eight_rows);
      ptx::wgmma_fence();
      multiply<T, kSize>(sum, x, args, weights, header, first_granule);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      // A warp lets go, of what each block of the cluster has brought, when its products are done.
      if (lane < args.cluster) ptx::mbarrier_arrive_remote(&shared.empty[ring.stage], lane);
      ring.advance();
      last = header.last != 0;
    }
    const OutputTile tile = tile_of(args, number);
#pragma unroll
    for (int half = 0; half < G::kHalves; ++half) {
      store<T, kSize>(sum[half], shared.sums.data() + warp * kWarpSums, args, tile,
                      tile.first_pixel + G::pixel(half), lane);
    }
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads, 1) conv_wgmma(const __grid_constant__ Args args) {
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&args.weights_map);
    if (args.x_by_tma) ptx::prefetch_tensor_map(&args.x_map);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], args.x_by_tma ? 1 : 1 + kWarpgroup);
      ptx::mbarrier_init(&shared.empty[stage], kConsumerWarps * args.cluster);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume<T, kSize>(shared, args);
  } else {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    Producer<kSize>(shared, args).run();
  }
  ptx::cluster_sync();  // until then the other block writes and arrives here
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, int kSize>
void launch_conv(const CudaConvArgs& given, cudaStream_t stream) {
  const Weight& w = given.conv.weight;
  const ConvShape& s = given.conv.shape;
  const WgmmaTile& tile = kWgmmaTiles[given.config.tile];
  Args args{};
  args.layout = layout_of(given);
  args.groups = static_cast<unsigned>(w.groups);
  args.x = static_cast<const uint16_t*>(given.conv.x);
  args.bias = given.conv.bias;
  args.out = given.conv.out;
  args.activation = given.conv.activation;
  args.x_by_tma = sees_itself(s, w);
  args.cluster = tile.cluster, args.outputs = tile.outputs;
  while (1 << args.log2_cols < w.cols) ++args.log2_cols;
  while (args.layout.cols << args.steps.log2_parts < kStageChannels) ++args.steps.log2_parts;
  args.steps.of_tap = static_cast<int>(wgmma_steps_of_tap(w));
  args.steps.count = static_cast<int>(w.taps) * args.steps.of_tap;

  const int64_t extents[] = {w.cols, w.rows, std::max<int64_t>(w.nnz, 1)};
  const int64_t pitches[] = {w.cols * 2, w.rows * w.cols * 2};
  const int box[] = {static_cast<int>(w.cols), kSize, 1};
  args.weights_map =
      tensor_map(w.values, 2, 3, extents, pitches, box, static_cast<Swizzle>(args.log2_cols - 3));
  if (args.x_by_tma) {
    const int64_t size[] = {s.in_channels, args.layout.pixels}, pitch[] = {s.in_channels * 2};
    const int part[] = {kStageChannels, kHalfPixels};
    args.x_map = tensor_map(given.conv.x, 2, 2, size, pitch, part, Swizzle::k128);
  }
  args.tiles = grid_of(given) / static_cast<unsigned>(tile.cluster);
  const auto most = static_cast<unsigned>(std::max(given.config.blocks_at_once / tile.cluster, 1));
  launch_cluster(tile.cluster, conv_wgmma<T, kSize>,
                 dim3(std::min(args.tiles, most) * static_cast<unsigned>(tile.cluster)), kThreads,
                 sizeof(Shared), stream, args);
}

template <class T>
void launch_type(const CudaConvArgs& args, cudaStream_t stream) {
  const Weight& w = args.conv.weight;
  std::min(w.rows, w.cols) == 16 ? launch_conv<T, 16>(args, stream)
                                 : launch_conv<T, 32>(args, stream);
}

}  // namespace

void conv_sm90(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.conv.weight.dtype) {
    case DType::kBFloat16: return launch_type<BFloat16>(args, stream);
    case DType::kFloat16: return launch_type<Float16>(args, stream);
    default: fail("blocksparse: there is no tensor-core kernel for ", name(args.conv.weight.dtype));
  }
}

}  // namespace gossamer::blocksparse
