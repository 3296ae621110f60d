#pragma once
// How the exact float32 GEMM is cut up on a GPU.
//
// A warp computes 32 rows of the weight for tile_m rows of x; warps_k of them share those rows, and
// split_k blocks share a tile.
#include "sparse24/gemm_cuda_config.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

constexpr int kFloat32Warps = 8;      // of a block; config: tile_n / 32 * warps_k
constexpr int kFloat32MaxTileM = 16;  // powers of two up to it have a kernel

// Blocks that run on a multiprocessor together. The registers for two records and the sums allow no
// more; with few rows of x, where memory is the limit, it takes many warps to keep it busy.
constexpr int float32_blocks(int tile_m) { return tile_m <= 2 ? 4 : tile_m <= 4 ? 3 : 2; }

inline int64_t float32_tiles(const CudaGemmConfig& c, int64_t m, int64_t n) {
  return ceil_div(m, c.tile_m) * ceil_div(n, c.tile_n);
}

inline CudaGemmConfig choose_float32_config(int64_t m, int64_t n, int64_t k,
                                            const CudaDevice& device) {
  CudaGemmConfig c{CudaKernel::kFloat32, 32, 1, kFloat32Warps, 1};
  while (c.tile_m < m && c.tile_m < kFloat32MaxTileM) c.tile_m *= 2;
  // Each block reads the x of its tile: with few rows of x that is little, and warps are better
  // spent along K; with many, 128 rows of the weight share it.
  c.tile_n = c.tile_m <= 2 ? 32 : c.tile_m <= 4 ? 64 : 128;
  c.warps_k = kFloat32Warps / (c.tile_n / 32);

  // Enough blocks for every multiprocessor. More splits would only add sums, and below two records
  // a warp the loads of one no longer hide behind the work on the other.
  const int64_t wanted = int64_t{device.multiprocessors} * float32_blocks(c.tile_m);
  const int64_t tiles = float32_tiles(c, m, n);
  const int64_t records = ceil_div(k, kRecordK), most = records / (2 * c.warps_k);
  int64_t split = wanted / tiles;
  split = split < most ? split : most;
  if (split > 1 && tiles <= kCudaCounters) c.split_k = static_cast<int>(split);
  return c;
}

// A block of a split tile leaves its sums there.
inline int64_t float32_workspace_bytes(const CudaGemmConfig& c, int64_t m, int64_t n) {
  if (c.split_k <= 1) return 0;
  return float32_tiles(c, m, n) * c.split_k * c.tile_m * c.tile_n * int64_t{sizeof(float)};
}

}  // namespace gossamer::sparse24
