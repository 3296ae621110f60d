// Block-sparse convolution of 16-bit floats on Hopper, for blocks of 16, 32 or 64 rows and columns
// and x with its channels last:
//
//   y[o, n] = act(sum over live (tap, c) of x[at(o, tap), c] W[n, tap, c] + b[n] + residual[o, n])
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
// By arithmetic and by the machine code, for a step of 128 x 256 with a quarter of its blocks live,
// in cycles:
//
//                              32 x 32   16 x 16
//   products                     256       256    at wgmma's full rate
//   L2                           614       614    16 KB of x and 8 KB of weights, at the 40 bytes a
//                                                 cycle that a multiprocessor was seen to get
//     in clusters                410       410    two blocks with other outputs bring half of the
//                                                 pixels of x each, and multicast them to both
//   shared memory                440       570    written; x by ldmatrix, weights by wgmma
//   what a warpgroup issues      320       530    5 for a dead granule, 25 for a live one, 140 to
//                                                 wait, read x and drain
//
// so it is bound by the L2, in clusters by shared memory. What wgmma loses with 16 and 32 outputs
// is not in there, and nothing of this has been measured. To ptxas each product that is branched
// around is a group of its own, so no wait can leave a group running: a warpgroup drains at each
// step, while the other one goes on.
#include <algorithm>

#include "blocksparse/conv_cuda.h"
#include "blocksparse/conv_sm90_producer.cuh"
#include "common/check.h"
#include "common/stored_run.cuh"

namespace gossamer::blocksparse {
namespace {

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
  const uint32_t mine = (1u << args.outputs / (kSize * (G::kSplitOutputs ? 2 : 1))) - 1;
  const uint32_t lower =
      static_cast<uint32_t>(weights) + static_cast<uint32_t>(first * (G::kBytes / 16));
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; quarter += G::kDepth) {
    const uint32_t live =
        ((quarter < 2 ? header.low : header.high) >> (quarter % 2 * kPlanBits + first)) & mine;
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
  constexpr int kRun = StoredRun<T>::kRun;
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
    const auto there = tile.run(args.layout, first_output + first + column, kRun, args.outputs);
    const StoredRun<T> run(there.first, there.count, args.bias, args.activation);
#pragma unroll 1
    for (int row = lane / 4; row < kWarpPixels && run.count > 0; row += 8) {
      if (first_pixel + row >= args.layout.pixels) break;
      const int64_t at = args.layout.out_offset(first_pixel + row);
      const T* residual =
          args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + at;
      run.store(static_cast<T*>(args.out) + at, sums + row * kSumStride + column, residual);
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
  args.residual = given.conv.residual;
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
