// The products of experts in float32 without tensor cores, every product and sum exact to it
// (cuda.h, gemm_tile.cuh). A thread block computes 64 rows x 64 columns, a thread 8 x 4 of them:
//
//   columns   4q to 4q + 3, q = thread / 8
//   rows      l, l + 8 .. l + 56, l = thread % 8: eight lines in a row are in different banks
//             of dW, whose lines run along the rows: 4l to 4l + 3 and 32 + 4l to 35 + 4l
//
// Arithmetic: 128 multiply-adds for 12 loads of 16 bytes from shared memory, of which many lanes
// read the same, so that multiply-adds are the limit where an expert has many tokens.
#include "common/run.cuh"
#include "grouped/gemm_tile.cuh"

namespace gossamer::grouped {
namespace {

constexpr int kThreads = 128, kStages = 3;
constexpr int kLanes = 8;
constexpr int kMine = kFmaRows / kLanes;  // rows of a thread
constexpr int kQuad = 4;                  // its columns, and the floats of a piece
static_assert(kFmaColumns == kThreads / kLanes * kQuad && kMine == 2 * kQuad);

using Four = Run<float, kQuad>;

template <CudaProduct kProduct>
using Stages = ProductStages<float, kProduct, kFmaRows, kFmaColumns, kThreads, kStages>;

template <CudaProduct kProduct>
struct Shared {
  SharedTile<uint4, kStages * Stages<kProduct>::kPieces, 128> stages;
};

template <class Operand>
__device__ __forceinline__ Four four(const uint4* operand, int line, int piece) {
  return *reinterpret_cast<const Four*>(operand + place_of<Operand::kLine>(line, piece));
}

template <CudaProduct kProduct>
__device__ __forceinline__ int row_of(int lane, int i) {
  return kTurnsA<kProduct> ? i / kQuad * 32 + kQuad * lane + i % kQuad : lane + kLanes * i;
}

// sum[i][j] += A of row i times B of column j, over four steps.
template <CudaProduct kProduct>
__device__ __forceinline__ void multiply(float (&sum)[kMine][kQuad], const uint4* a, const uint4* b,
                                         int lane, int quad, int piece) {
  using A = typename Stages<kProduct>::A;
  using B = typename Stages<kProduct>::B;
  // [step] of four columns where B is turned, or else [column] of four steps
  Four columns[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    columns[i] = kTurnsB<kProduct> ? four<B>(b, kQuad * piece + i, quad)
                                   : four<B>(b, kQuad * quad + i, piece);
  }
  if constexpr (kTurnsA<kProduct>) {
#pragma unroll
    for (int step = 0; step < kQuad; ++step) {
      const Four near = four<A>(a, kQuad * piece + step, lane);
      const Four far = four<A>(a, kQuad * piece + step, lane + kLanes);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const float row = i < kQuad ? near.at[i % kQuad] : far.at[i % kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) sum[i][j] += row * columns[step].at[j];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Four row = four<A>(a, row_of<kProduct>(lane, i), piece);
#pragma unroll
      for (int step = 0; step < kQuad; ++step) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          sum[i][j] +=
              row.at[step] * (kTurnsB<kProduct> ? columns[step].at[j] : columns[j].at[step]);
        }
      }
    }
  }
}

template <CudaProduct kProduct>
__global__ void __launch_bounds__(kThreads, 4) grouped_fma(const ProductOperands<float> args) {
  auto& shared = *shared_memory<Shared<kProduct>>();
  const ProductTile tile(kProduct, kFmaRows, kFmaColumns, args);
  if (tile.rows == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int quad = static_cast<int>(threadIdx.x) / kLanes;

  float sum[kMine][kQuad] = {};
  Stages<kProduct>::run(args, tile, shared.stages.data(), [&](const uint4* a, const uint4* b) {
#pragma unroll 1
    for (int piece = 0; piece < kStageInner / kQuad; ++piece) {
      multiply<kProduct>(sum, a, b, lane, quad, piece);
    }
  });

  const int column = kQuad * quad, count = tile.columns - column;
  if (count <= 0) return;
  Four bias{};
  if (args.bias != nullptr) {
    const auto* biases = static_cast<const float*>(args.bias) + tile.expert * tile.across;
    bias = load_run<float, kQuad>(biases + tile.column + column, count);
  }
  float* out = static_cast<float*>(args.out) + tile.out + column;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int row = row_of<kProduct>(lane, i);
    if (row >= tile.rows) continue;
    Four y;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) y.at[j] = activate(sum[i][j] + bias.at[j], args.activation);
    store_run(out + row * tile.across, y, count);
  }
}

}  // namespace

void gemm_fma(const CudaGroupedArgs& args, cudaStream_t stream) {
  if (args.dtype != DType::kFloat32) fail("grouped: there is no fma kernel for ", name(args.dtype));
  for_product(args.product, [&](auto product) {
    launch(grouped_fma<product.value>, grid_of(args), kThreads, sizeof(Shared<product.value>),
           stream, ProductOperands<float>(args));
  });
}

}  // namespace gossamer::grouped
