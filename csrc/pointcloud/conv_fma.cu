// Convolution over voxels in float32 without tensor cores, every product and sum exact to it:
//
//   y[j, o] = act(b[o] + sum over taps t, over c, of x[i(t, j), c] W[t, c, o])
//
// A thread block computes 64 outputs of similar taps x 64 channels (cuda.h). Stages are filled as
// those of conv_sm80.cu are, 32 channels of a tap each:
//
//   x  [position][8 pieces of 4 channels]   W  [channel][16 pieces of 4 outputs]
//
// A thread sums 8 positions x 4 outputs:
//
//   warp 0    outputs 0-3      lanes  0-7     positions l, l + 8 .. l + 56: eight rows in a row are
//             outputs 4-7      lanes  8-15    in different banks
//             ...
#include "common/activation.cuh"
#include "common/check.h"
#include "common/run.cuh"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/conv_tile.cuh"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 128, kStages = 3;
constexpr int kLanes = 8;                 // along the positions
constexpr int kMine = kFmaRows / kLanes;  // positions of a thread
constexpr int kQuad = 4;                  // its outputs, and the channels of a piece
static_assert(kFmaOutputs == kThreads / kLanes * kQuad);

using Stage = ConvStage<float, kFmaRows, kFmaOutputs>;
using Four = Run<float, kQuad>;

struct Shared {
  SharedTile<uint4, kStages * Stage::kPieces, 128> stages;
};

// sum[i][j] += x of position i times the weights of output j, over four channels.
__device__ __forceinline__ void multiply(float (&sum)[kMine][kQuad], const uint4* x, const uint4* w,
                                         int lane, int quad, int piece) {
  Four weights[kQuad];
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    const int at = place_of<Stage::kWPieces>(kQuad * piece + c, quad);
    weights[c] = *reinterpret_cast<const Four*>(w + at);
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int at = place_of<Stage::kXPieces>(lane + kLanes * i, piece);
    const Four channels = *reinterpret_cast<const Four*>(x + at);
#pragma unroll
    for (int c = 0; c < kQuad; ++c) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum[i][j] += channels.at[c] * weights[c].at[j];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) conv_fma_kernel(const ConvOperands<float> args) {
  Shared& shared = *shared_memory<Shared>();
  const OutputTile tile(kFmaRows, kFmaOutputs, args.c_out);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int quad = static_cast<int>(threadIdx.x) / kLanes;

  ConvLoader<float, kFmaRows, kFmaOutputs, kThreads> loader(args, shared.stages.data(), tile);
  float sum[kMine][kQuad] = {};
  unsigned queue = 0;         // what the stages on their way hold, the next one's in the low bits
  int stage = 0, filled = 0;  // the one to multiply, and the one to fill
#pragma unroll 1
  for (int step = 1 - kStages;; ++step) {
    const unsigned holds = queue & 0xff;
    if (step >= 0) {
      if (holds == 0) break;
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before it any more
    }
    queue = queue >> 8 | loader.load(filled) << (8 * (kStages - 2));
    filled = filled + 1 == kStages ? 0 : filled + 1;
    if (step < 0) continue;
    const uint4* x = shared.stages.data() + stage * Stage::kPieces;
    const int pieces = (holds & kBothHalves ? 32 : 16) / kQuad;
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      multiply(sum, x, x + Stage::kX, lane, quad, piece);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();

  const int output = tile.first_output + kQuad * quad, count = args.c_out - output;
  if (count <= 0) return;
  Four bias{};
  if (args.bias != nullptr)
    bias = load_run<float, kQuad>(static_cast<const float*>(args.bias) + output, count);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int to = args.table.rows[tile.position() + lane + kLanes * i];
    if (static_cast<unsigned>(to) >= static_cast<unsigned>(args.table.n_out)) continue;
    Four y;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y.at[j] = activate(sum[i][j] + bias.at[j], args.activation);
    store_run(static_cast<float*>(args.y) + int64_t{to} * args.c_out + output, y, count);
  }
}

}  // namespace

void conv_fma(const CudaConvArgs& args, cudaStream_t stream) {
  if (args.dtype != DType::kFloat32) {
    fail("pointcloud: there is no fma kernel for ", name(args.dtype));
  }
  launch(conv_fma_kernel, grid_of(args), kThreads, sizeof(Shared), stream,
         operands_of<float>(args));
}

}  // namespace gossamer::pointcloud
