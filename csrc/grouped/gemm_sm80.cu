// The products of experts of 16-bit floats by tensor cores (cuda.h, gemm_tile.cuh):
//
//   y = act(x Wᵀ + b)      dx = dy W      dW = dyᵀ x
//
// A thread block computes a tile of one expert's result. An operand whose lines run along the inner
// dimension goes to mma by ldmatrix, the others by ldmatrix.trans: so none is turned in memory. A
// warp whose rows are past the expert's last token leaves its products out, but reads the weights
// like the others.
//
// Arithmetic, for a multiprocessor at 1024 products a cycle (sm_80; mma of Hopper is about as fast,
// half of its wgmma) and 32 bytes a cycle from the L2: a stage of the tile of 128 x 128 takes 512
// cycles of either, one of 64 x 64 256 of the L2 and 128 of products. An expert of up to 64 tokens
// reads its weights once, 4 KB for those 128 cycles, at up to 32 bytes a cycle, where HBM gives
// about 20: so the weights' bytes are the limit there, and tensor cores are that of many tokens.
#include "grouped/gemm_tile.cuh"

namespace gossamer::grouped {
namespace {

using Operands = ProductOperands<uint16_t>;

template <CudaProduct kProduct, int kTile>
struct Tile {
  static constexpr GroupedTile kSizes = kMmaTiles[kTile];
  static constexpr int kThreads = kSizes.warps() * kWarp;
  static constexpr int kWarpRows = kSizes.rows / kSizes.warps_rows;
  static constexpr int kWarpColumns = kSizes.columns / kSizes.warps_columns;
  using Stages =
      ProductStages<uint16_t, kProduct, kSizes.rows, kSizes.columns, kThreads, kSizes.stages>;
  template <class T>
  using Sums = WarpTile<T, kWarpRows / 16, kWarpColumns / 8>;
  // Stages of A, then B each; at the end the sums.
  struct Shared {
    SharedTile<uint4, kSizes.stages * Stages::kPieces, 128> stages;
  };
  static_assert(kSizes.warps() * Sums<BFloat16>::kSums * 4 <= kSizes.stages * Stages::kPieces * 16);
};

template <class T, CudaProduct kProduct, int kTile>
__global__ void __launch_bounds__(Tile<kProduct, kTile>::kThreads,
                                  Tile<kProduct, kTile>::kSizes.resident)
    grouped_mma(const Operands args) {
  using Sizes = Tile<kProduct, kTile>;
  using Stages = typename Sizes::Stages;
  auto& shared = *shared_memory<typename Sizes::Shared>();
  const ProductTile tile(kProduct, Sizes::kSizes.rows, Sizes::kSizes.columns, args);
  if (tile.rows == 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp / Sizes::kSizes.warps_columns * Sizes::kWarpRows;
  const int column = warp % Sizes::kSizes.warps_columns * Sizes::kWarpColumns;

  typename Sizes::template Sums<T> sums;
  const bool has_rows = row < tile.rows;
  Stages::run(args, tile, shared.stages.data(), [&](const uint4* a, const uint4* b) {
    if (!has_rows) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums.template multiply_half<typename Stages::A::Kind, typename Stages::B::Kind>(
          a, row, b, column, half, lane);
    }
  });

  __syncthreads();
  const auto* bias = static_cast<const T*>(args.bias);
  if (bias != nullptr) bias += tile.expert * tile.across + tile.column + column;
  T* out = static_cast<T*>(args.out) + tile.out + column;
  sums.store(reinterpret_cast<float*>(shared.stages.data()) + warp * sums.kSums, bias,
             args.activation, tile.columns - column, lane, [&](int i) -> T* {
               return row + i < tile.rows ? out + (row + i) * tile.across : nullptr;
             });
}

template <class T, int kTile>
void launch_tile(const CudaGroupedArgs& args, cudaStream_t stream) {
  for_product(args.product, [&](auto product) {
    using Sizes = Tile<product.value, kTile>;
    launch(grouped_mma<T, product.value, kTile>, grid_of(args), Sizes::kThreads,
           sizeof(typename Sizes::Shared), stream, Operands(args));
  });
}

template <class T>
void launch_type(const CudaGroupedArgs& args, cudaStream_t stream) {
  static_assert(kMmaTileCount == 2);
  switch (args.config.tile) {
    case 0: return launch_tile<T, 0>(args, stream);
    case 1: return launch_tile<T, 1>(args, stream);
    default: fail("grouped: there is no tile ", args.config.tile);
  }
}

}  // namespace

void gemm_sm80(const CudaGroupedArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16: return launch_type<BFloat16>(args, stream);
    case DType::kFloat16: return launch_type<Float16>(args, stream);
    default: fail("grouped: there is no tensor-core kernel for ", name(args.dtype));
  }
}

}  // namespace gossamer::grouped
