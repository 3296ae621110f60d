// Convolution over voxels of 16-bit floats by tensor cores:
//
//   y[j, o] = act(b[o] + sum over taps t, over c, of x[i(t, j), c] W[t, c, o])
//
// An implicit GEMM. A thread block computes a tile of outputs of similar taps x channels (cuda.h).
// It visits the taps that any of them has, in ascending order, and gathers the rows of x that a tap
// meets; the others are zeros, and are not read. An output's sum is therefore the same, bit for
// bit, whatever stands beside it.
//
//   a stage    32 channels of a tap
//   x          [position][4 pieces of 16 bytes]
//   W          [channel][pieces of 16 bytes along the outputs]
//   A, B       of mma: A = x [16 positions][16 channels], B = W [16 channels][8 outputs]
//
// One stage is multiplied while cp.async fills the others. A thread fills the same rows at every
// stage, and has the places of the next tap's in registers before it needs them. A warp whose 32
// positions have nothing of a tap leaves its products out. Where rows do not begin at multiples of
// 16 bytes, their pieces go through registers instead, element by element.
#include "common/check.h"
#include "common/warp_tile.cuh"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/conv_tile.cuh"

namespace gossamer::pointcloud {
namespace {

template <int kTile>
struct Tile {
  static constexpr ConvTile kSizes = kConvTiles[kTile];
  static constexpr int kRows = kSizes.rows, kOutputs = kSizes.outputs, kStages = kSizes.stages;
  static constexpr int kWarpsX = kSizes.warps_x(), kThreads = kSizes.warps() * kWarp;
  static constexpr int kWarpOutputs = kOutputs / kSizes.warps_w;
  using Stage = ConvStage<uint16_t, kRows, kOutputs>;
  using X = Lines<Stage::kXPieces, false>;
  using W = Lines<Stage::kWPieces, true>;
  template <class T>
  using Sums = WarpTile<T, kQuarterRows / 16, kWarpOutputs / 8>;
  static_assert(kSizes.warps() * Sums<BFloat16>::kSums * 4 <= kStages * Stage::kPieces * 16);
  static_assert(8 * (kStages - 1) <= 32);
};

template <int kTile>
struct Shared {
  // x, then W; at the end the sums.
  SharedTile<uint4, Tile<kTile>::kStages * Tile<kTile>::Stage::kPieces, 128> stages;
};

using Args = ConvOperands<uint16_t>;

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, int kTile>
__global__ void __launch_bounds__(Tile<kTile>::kThreads, Tile<kTile>::kSizes.resident)
    conv_mma(const Args args) {
  using Sizes = Tile<kTile>;
  Shared<kTile>& shared = *shared_memory<Shared<kTile>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_x = warp % Sizes::kWarpsX, warp_w = warp / Sizes::kWarpsX;
  const int row = warp_x * kQuarterRows, output = warp_w * Sizes::kWarpOutputs;  // of the tile
  const OutputTile tile(Sizes::kRows, Sizes::kOutputs, args.c_out);

  ConvLoader<uint16_t, Sizes::kRows, Sizes::kOutputs, Sizes::kThreads> loader(
      args, shared.stages.data(), tile);
  using X = typename Sizes::X;
  using W = typename Sizes::W;
  typename Sizes::template Sums<T> sums;
  unsigned queue = 0;         // what the stages on their way hold, the next one's in the low bits
  int stage = 0, filled = 0;  // the one to multiply, and the one to fill
#pragma unroll 1              // the first steps only fill: so the code that does it is there once
  for (int step = 1 - Sizes::kStages;; ++step) {
    const unsigned holds = queue & 0xff;
    if (step >= 0) {
      if (holds == 0) break;
      ptx::cp_async_wait<Sizes::kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before it any more
    }
    queue = queue >> 8 | loader.load(filled) << (8 * (Sizes::kStages - 2));
    filled = filled + 1 == Sizes::kStages ? 0 : filled + 1;
    if (step < 0) continue;

    const uint4* x = shared.stages.data() + stage * Sizes::Stage::kPieces;
    const uint4* w = x + Sizes::Stage::kX;
    if (holds >> warp_x & 1) {
      sums.template multiply_half<X, W>(x, row, w, output, 0, lane);
      if (holds & kBothHalves) sums.template multiply_half<X, W>(x, row, w, output, 1, lane);
    }
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  const int first = tile.first_output + output;
  const auto* bias = static_cast<const T*>(args.bias);
  sums.store(reinterpret_cast<float*>(shared.stages.data()) + warp * sums.kSums,
             bias == nullptr ? bias : bias + first, args.activation, args.c_out - first, lane,
             [&](int i) -> T* {
               const int to = args.table.rows[tile.position() + row + i];
               if (static_cast<unsigned>(to) >= static_cast<unsigned>(args.table.n_out)) {
                 return nullptr;
               }
               return static_cast<T*>(args.y) + int64_t{to} * args.c_out + first;
             });
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, int kTile>
void launch_tile(const CudaConvArgs& conv, cudaStream_t stream) {
  launch(conv_mma<T, kTile>, grid_of(conv), Tile<kTile>::kThreads, sizeof(Shared<kTile>), stream,
         operands_of<uint16_t>(conv));
}

template <class T>
void launch_type(const CudaConvArgs& args, cudaStream_t stream) {
  static_assert(kConvTileCount == 3);
  switch (args.config.tile) {
    case 0: return launch_tile<T, 0>(args, stream);
    case 1: return launch_tile<T, 1>(args, stream);
    case 2: return launch_tile<T, 2>(args, stream);
    default: fail("pointcloud: there is no tile ", args.config.tile);
  }
}

}  // namespace

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16: return launch_type<BFloat16>(args, stream);
    case DType::kFloat16: return launch_type<Float16>(args, stream);
    default: fail("pointcloud: there is no tensor-core kernel for ", name(args.dtype));
  }
}

}  // namespace gossamer::pointcloud
