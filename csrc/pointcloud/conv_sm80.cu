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
#include "common/pieces.cuh"
#include "common/ptx.cuh"
#include "common/stored_run.cuh"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/conv_tile.cuh"

namespace gossamer::pointcloud {
namespace {

constexpr int kSumPadding = 4;  // so that lanes write to different banks
constexpr int kSumRows = 16;    // of a warp, that go through shared memory at once

template <int kTile>
struct Tile {
  static constexpr ConvTile kSizes = kConvTiles[kTile];
  static constexpr int kRows = kSizes.rows, kOutputs = kSizes.outputs, kStages = kSizes.stages;
  static constexpr int kWarpsX = kSizes.warps_x(), kThreads = kSizes.warps() * kWarp;
  static constexpr int kRowTiles = kQuarterRows / 16;
  static constexpr int kWarpOutputs = kOutputs / kSizes.warps_w;
  static constexpr int kColumns = kWarpOutputs / 8;  // of mma
  using Stage = ConvStage<uint16_t, kRows, kOutputs>;
  static constexpr int kSumStride = kWarpOutputs + kSumPadding;
  static_assert(kSizes.warps() * kSumRows * kSumStride * 4 <= kStages * Stage::kPieces * 16);
  static_assert(8 * (kStages - 1) <= 32 && kColumns % 2 == 0);
};

template <int kTile>
struct Shared {
  // x, then W; at the end the sums.
  SharedTile<uint4, Tile<kTile>::kStages * Tile<kTile>::Stage::kPieces, 128> stages;
};

using Args = ConvOperands<uint16_t>;

// ---- products -----------------------------------------------------------------------------------

// sum[i][j] += x of the warp's positions 16i to 16i + 15 times the weights of its outputs 8j to
// 8j + 7, for half a stage's channels.
template <class T, int kTile>
__device__ __forceinline__ void multiply_half(
    float (&sum)[Tile<kTile>::kRowTiles][Tile<kTile>::kColumns][4], const uint4* x, const uint4* w,
    int warp_x, int warp_w, int half, int lane) {
  using Sizes = Tile<kTile>;
  // Lane 8m + r gives ldmatrix row r of matrix m. Of x those are positions 0-7 and 8-15 of piece 0,
  // then of piece 1; of W channels 0-7 and 8-15 of outputs 0-7, then of outputs 8-15.
  uint32_t a[Sizes::kRowTiles][4];
#pragma unroll
  for (int i = 0; i < Sizes::kRowTiles; ++i) {
    const int row = warp_x * kQuarterRows + 16 * i + lane % 16;
    ptx::ldmatrix(a[i], x + place_of<Sizes::Stage::kXPieces>(row, 2 * half + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < Sizes::kColumns; j += 2) {
    const int piece = warp_w * Sizes::kColumns + j + lane / 16;
    uint32_t b[4];
    ptx::ldmatrix_trans(b, w + place_of<Sizes::Stage::kWPieces>(16 * half + lane % 16, piece));
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < Sizes::kRowTiles; ++i) {
      ptx::mma_m16n8k16<T>(sum[i][j], a[i], low);
      ptx::mma_m16n8k16<T>(sum[i][j + 1], a[i], high);
    }
  }
}

// Stores 16 of a warp's positions: a lane takes runs of eight outputs.
template <class T, int kTile>
__device__ __forceinline__ void store(const Args& args, const float* sums, int64_t position,
                                      int first_output, int lane) {
  using Sizes = Tile<kTile>;
  constexpr int kRun = StoredRun<T>::kRun, kRuns = Sizes::kWarpOutputs / kRun;
  const int column = lane % kRuns * kRun, output = first_output + column;
  const StoredRun<T> run(output, min(args.c_out - output, kRun), args.bias, args.activation);
  if (run.count <= 0) return;
#pragma unroll 1
  for (int row = lane / kRuns; row < kSumRows; row += kWarp / kRuns) {
    const int to = args.table.rows[position + row];
    if (static_cast<unsigned>(to) >= static_cast<unsigned>(args.table.n_out)) continue;
    run.store(static_cast<T*>(args.y) + int64_t{to} * args.c_out,
              sums + row * Sizes::kSumStride + column);
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, int kTile>
__global__ void __launch_bounds__(Tile<kTile>::kThreads, Tile<kTile>::kSizes.resident)
    conv_mma(const Args args) {
  using Sizes = Tile<kTile>;
  Shared<kTile>& shared = *shared_memory<Shared<kTile>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_x = warp % Sizes::kWarpsX, warp_w = warp / Sizes::kWarpsX;
  const OutputTile tile(Sizes::kRows, Sizes::kOutputs, args.c_out);

  ConvLoader<uint16_t, Sizes::kRows, Sizes::kOutputs, Sizes::kThreads> loader(
      args, shared.stages.data(), tile);
  float sum[Sizes::kRowTiles][Sizes::kColumns][4] = {};
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
      multiply_half<T, kTile>(sum, x, w, warp_x, warp_w, 0, lane);
      if (holds & kBothHalves) {
        multiply_half<T, kTile>(sum, x, w, warp_x, warp_w, 1, lane);
      }
    }
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
  }

  // Through shared memory from fragments, in which a lane's outputs lie 8 apart, to rows of them;
  // each warp in a part of its own.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums =
      reinterpret_cast<float*>(shared.stages.data()) + warp * kSumRows * Sizes::kSumStride;
#pragma unroll
  for (int i = 0; i < Sizes::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Sizes::kColumns; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (8 * half + lane / 4) * Sizes::kSumStride + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(sums + at) =
            make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
    __syncwarp();
    store<T, kTile>(args, sums, tile.position() + warp_x * kQuarterRows + kSumRows * i,
                    tile.first_output + warp_w * Sizes::kWarpOutputs, lane);
    __syncwarp();
  }
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
