#pragma once
// How a GEMM on a GPU is cut up: a pure function of shape, dtype and device.
#include <cstdint>

#include "common/dtype.h"

namespace gossamer::sparse24 {

struct CudaDevice {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
  int64_t l2_bytes;
};

// decode:  few rows of x. Bound by reading the weights once, so warps stream them from global
//          memory into registers, and x lies in shared memory.
// prefill: many rows of x. Bound by arithmetic, tiles of both operands go through shared memory.
// wgmma:   prefill with Hopper's instructions.
// float32: exact, without tensor cores.
enum class CudaKernel : uint8_t { kDecode, kPrefill, kWgmma, kFloat32 };

struct CudaGemmConfig {
  CudaKernel kernel;
  int tile_n;   // rows of the weight a block computes
  int tile_m;   // rows of x a block computes
  int warps_k;  // decode: warps of a block that share rows, each with records of its own
  int split_k;  // blocks that share a tile; above 1 their sums meet in the workspace
  int blocks;   // wgmma: at most that many, each for one tile after another; 0: one for each tile
};

// Tiles whose blocks along K wait for each other, at most.
constexpr int kCudaCounters = 4096;

}  // namespace gossamer::sparse24
