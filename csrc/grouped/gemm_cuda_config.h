#pragma once
// How a product of experts is cut up on a GPU: a pure function of sizes and device, which knows how
// many tokens there are, but not whose they are.
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace gossamer::grouped {

enum class CudaProduct : uint8_t { kForward, kInput, kWeight };

// mma: bfloat16 and float16 by tensor cores. fma: exact float32, without them.
enum class CudaGroupedKernel : uint8_t { kMma, kFma };

static constexpr const char* name(CudaGroupedKernel kernel) {
  return kernel == CudaGroupedKernel::kMma ? "mma" : "fma";
}

// What a thread block computes, and how its warps share it.
struct GroupedTile {
  int rows, columns;
  int warps_rows, warps_columns;
  int stages;    // in shared memory: one is multiplied, the others are on their way
  int resident;  // blocks that a multiprocessor has registers and shared memory for
  constexpr int warps() const { return warps_rows * warps_columns; }
};

// The first reads the fewest bytes for a product. The second is for experts of few tokens, of which
// the first would be mostly padding, or would leave multiprocessors idle: four blocks of it keep
// 4 x 5 x 4 KB of weights on their way to a multiprocessor, which is what HBM needs (arithmetic:
// 37 KB at 4.8 TB/s, 132 multiprocessors and 1 us).
constexpr GroupedTile kMmaTiles[] = {
    {128, 128, 4, 2, 4, 2},
    {64, 64, 2, 2, 6, 4},
};
constexpr int kMmaTileCount = sizeof(kMmaTiles) / sizeof(GroupedTile);
constexpr int kFmaRows = 64, kFmaColumns = 64;
constexpr int kStageInner = 32;  // steps of the inner dimension

struct CudaGroupedConfig {
  CudaGroupedKernel kernel;
  int tile;  // mma: which of kMmaTiles

  int rows() const { return kernel == CudaGroupedKernel::kMma ? kMmaTiles[tile].rows : kFmaRows; }
  int columns() const {
    return kernel == CudaGroupedKernel::kMma ? kMmaTiles[tile].columns : kFmaColumns;
  }
  // Of the tokens there is a place for every tile that any offsets can ask for (gemm_tile.cuh).
  int64_t blocks(CudaProduct product, int64_t experts, int64_t tokens, int64_t n, int64_t k) const {
    const int64_t across = ceil_div(product == CudaProduct::kForward ? n : k, columns());
    return across * (product == CudaProduct::kWeight ? experts * ceil_div(n, rows())
                                                     : tokens / rows() + experts);
  }
};

// The large tile where an expert's share of the tokens fills more than half of it, and where such
// tiles occupy the GPU.
inline CudaGroupedConfig choose_cuda_config(DType dtype, CudaProduct product, int64_t experts,
                                            int64_t tokens, int64_t n, int64_t k,
                                            const CudaDevice& device) {
  if (size_of(dtype) != 2) return {CudaGroupedKernel::kFma, 0};
  const bool filled = product == CudaProduct::kWeight || tokens > kMmaTiles[1].rows * experts;
  const CudaGroupedConfig large{CudaGroupedKernel::kMma, 0};
  const bool busy = large.blocks(product, experts, tokens, n, k) >= device.multiprocessors;
  return {CudaGroupedKernel::kMma, filled && busy ? 0 : 1};
}

}  // namespace gossamer::grouped
