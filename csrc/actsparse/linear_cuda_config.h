#pragma once
// How the product that skips zero inputs is cut up on a GPU: a pure function of sizes and device.
#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace gossamer::actsparse {

constexpr int kLinearThreads = 256, kLinearWarps = kLinearThreads / 32;
// Thread blocks that a multiprocessor has registers for, of every tile.
constexpr int kLinearResident = 2;
// Most tokens that share one reading of the weights; more take several blocks, which read them
// again. Weights that are not aligned are read for one token at a time.
constexpr int kLinearTokens = 8;
// Rows of x above which the product is torch's; one, where weights are not aligned. Which inputs
// are zero is known on the GPU alone, so this cannot depend on it: two tiles read the weights
// twice, and without zeros take about twice a dense product's time (arithmetic), of 64 rows eight
// times.
constexpr int64_t kLinearMostRows = 16;
// The same of wanted outputs, whose tiles have up to 4 tokens.
constexpr int64_t kOutputsMostRows = 8;
// The counters that blocks of a tile meet at.
constexpr int64_t kLinearCounters = 1024;

// Outputs of a block: 16 bytes of a row of weights for each lane.
constexpr int linear_columns(DType dtype) { return static_cast<int>(512 / size_of(dtype)); }

// Whether rows come in whole pieces of 16 bytes.
inline bool is_aligned_weight(DType dtype, const void* weight, int64_t stride, int64_t n) {
  const int64_t piece = 16 / size_of(dtype);
  return reinterpret_cast<uintptr_t>(weight) % 16 == 0 && stride % piece == 0 && n % piece == 0;
}

struct CudaLinearConfig {
  int tokens;   // of a block: 1, 4 or 8
  int split_k;  // blocks that share a tile

  int64_t tiles(DType dtype, int64_t m, int64_t n) const {
    return ceil_div(m, tokens) * ceil_div(n, linear_columns(dtype));
  }
  int64_t workspace_bytes(DType dtype, int64_t m, int64_t n) const {
    if (split_k == 1) return 0;
    return tiles(dtype, m, n) * split_k * tokens * linear_columns(dtype) * int64_t{sizeof(float)};
  }
};

inline CudaLinearConfig choose_cuda_linear_config(DType dtype, int64_t m, int64_t n, int64_t k,
                                                  bool aligned, const CudaDevice& device) {
  CudaLinearConfig config{m == 1 || !aligned ? 1 : m <= 4 ? 4 : kLinearTokens, 1};
  const int64_t tiles = std::max<int64_t>(config.tiles(dtype, m, n), 1);
  if (tiles > kLinearCounters) return config;
  // As many blocks as run at once: one more would have the machine to itself. Four inputs a warp,
  // of which most are zero, are the fewest worth a sum.
  const int64_t fit = int64_t{device.multiprocessors} * kLinearResident / tiles;
  const int64_t most = k / (4 * kLinearWarps);
  config.split_k = static_cast<int>(std::max<int64_t>(std::min({fit, most, int64_t{256}}), 1));
  return config;
}

}  // namespace gossamer::actsparse
