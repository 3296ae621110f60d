#pragma once
// Which kernel computes a GEMM on a GPU, and how it is cut up: a pure function of shape, dtype and
// device, tested without one.
#include "sparse24/gemm_cuda_config.h"
#include "sparse24/gemm_float32_config.h"

namespace gossamer::sparse24 {

// The kernel has tiles of 256 x 128, 128 x 256 and 128 x 128 (rows of W x rows of x), one block a
// multiprocessor that computes tile after tile. Before the tensor cores run out the L2 does, so a
// tile costs what it reads: of 16-bit types 128 bytes of each row of x a step, and 72 of each row
// of W, which is why the tile with more rows of W is the cheaper one. The small tile is taken where
// it leaves fewer multiprocessors idle by more than it reads in addition.
inline CudaGemmConfig wgmma_config(int64_t m, int64_t n, const CudaDevice& device) {
  constexpr struct {
    int n, m;
  } kTiles[] = {{256, 128}, {128, 256}, {128, 128}};
  CudaGemmConfig best{};
  double least = 0;
  for (const auto& tile : kTiles) {
    const int64_t tiles = ceil_div(n, tile.n) * ceil_div(m, tile.m);
    const int64_t rounds = ceil_div(tiles, device.multiprocessors);
    const double cost = static_cast<double>(rounds) * (128 * tile.m + 72 * tile.n);
    if (best.tile_n != 0 && cost >= least) continue;
    const auto blocks = static_cast<int>(ceil_div(tiles, rounds));
    best = {CudaKernel::kWgmma, tile.n, tile.m, 1, 1, blocks};
    least = cost;
  }
  return best;
}

// mma.sp multiplies float8_e4m3fn on 8.9 and from 12.0 on, wgmma.sp on 9.0. Before 8.9 there is no
// such instruction, and the others emulate it with float16.
constexpr bool has_float8(int capability) {
  return capability == 89 || capability == 90 || capability >= 120;
}

// Above 64 rows decode reads the weights once more for every 64, from the L2 after the first time.
// That is still less time than tiles of 128 x 128 take which leave most multiprocessors idle.
inline bool fills_few(int64_t m, int64_t n, const CudaDevice& device) {
  const int64_t tiles = ceil_div(n, 128) * ceil_div(m, 128);
  return m <= 4 * kDecodeRows && 2 * tiles <= device.multiprocessors;
}

// `dtype` is that of the weight's values (kUInt8: int4), which the device has a product of; all of
// m, n and k are at least 1. There is no prefill kernel for int4 weights: decode's takes any m.
inline CudaGemmConfig choose_cuda_gemm_config(int64_t m, int64_t n, int64_t k, DType dtype,
                                              const CudaDevice& device) {
  if (dtype == DType::kFloat32) return choose_float32_config(m, n, k, device);
  // Also for few rows of x, which leave most of a tile empty: nothing else multiplies it there.
  if (dtype == DType::kE4M3 && device.capability == 90) return wgmma_config(m, n, device);
  if (m <= kDecodeRows || dtype == DType::kUInt8 || fills_few(m, n, device)) {
    return decode_config(m, n, k, dtype, device);
  }
  if (device.capability == 90) return wgmma_config(m, n, device);
  return prefill_config(m, n, device);
}

// Whether a kernel computes the product as `config` says, which may be another than is chosen.
inline bool can_run(const CudaGemmConfig& config, int64_t m, int64_t n, int64_t k, DType dtype,
                    const CudaDevice& device) {
  const bool is_float8 = dtype == DType::kE4M3, by_mma = !is_float8 || device.capability != 90;
  switch (config.kernel) {
    case CudaKernel::kDecode: {
      const bool has_sizes = (config.tile_m == 8 || config.tile_m == 16 || config.tile_m == 32 ||
                              config.tile_m == 64) &&
                             (config.warps_k == 1 || config.warps_k == 2 || config.warps_k == 4 ||
                              config.warps_k == 8) &&
                             config.tile_n == decode_tile_n(config.tile_m, config.warps_k, dtype);
      return dtype != DType::kFloat32 && by_mma && has_sizes && config.split_k >= 1 &&
             config.split_k <= ceil_div(k, kFragmentColumns) &&
             DecodeModel{m, n, k, dtype, device}.is_legal(config);
    }
    case CudaKernel::kPrefill:
      return dtype != DType::kFloat32 && dtype != DType::kUInt8 && by_mma &&
             config.tile_n == kPrefillTileN && (config.tile_m == 128 || config.tile_m == 256) &&
             config.split_k == 1 && prefill_shared_bytes(config.tile_m) <= device.shared_bytes;
    case CudaKernel::kWgmma:
      return dtype != DType::kFloat32 && dtype != DType::kUInt8 && device.capability == 90 &&
             config.split_k == 1 && config.blocks >= 0;  // the kernel knows its tiles
    case CudaKernel::kStream:
      return dtype != DType::kFloat32 && dtype != DType::kUInt8 && device.capability == 90 &&
             is_legal_stream(config, m, n, k);
    case CudaKernel::kFloat32: return false;
  }
  return false;
}

inline int64_t workspace_bytes(const CudaGemmConfig& config, int64_t m, int64_t n) {
  if (config.kernel == CudaKernel::kFloat32) return float32_workspace_bytes(config, m, n);
  return config.workspace_bytes(m, n);
}

constexpr const char* reason(CudaKernel kernel, int64_t m) {
  switch (kernel) {
    case CudaKernel::kDecode:
      return m > kDecodeRows ? "reads the weights for every 64 rows, by all multiprocessors"
                             : "up to 64 rows: bound by reading the weights once";
    case CudaKernel::kPrefill: return "many rows: bound by arithmetic";
    case CudaKernel::kWgmma:
      return m > kDecodeRows ? "many rows on Hopper: bound by arithmetic"
                             : "the only sparse product of float8 that Hopper has";
    case CudaKernel::kFloat32: return "exact float32, which tensor cores do not multiply";
    case CudaKernel::kStream: return "few rows on Hopper: bound by reading the weights once";
  }
  return "?";
}

}  // namespace gossamer::sparse24
