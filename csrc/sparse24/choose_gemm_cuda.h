#pragma once
// Which kernel computes a GEMM on a GPU, and how it is cut up: a pure function of shape, dtype and
// device, tested without one.
#include <cmath>

#include "sparse24/gemm_cuda_config.h"
#include "sparse24/gemm_float32_config.h"

namespace gossamer::sparse24 {

// A model of Hopper's kernels, in the units of DecodeModel and fitted in the same way: over 50
// products it chose within 1 % of the fastest in the mean, and within 7 %. That was before tiles of
// 256 rows of x shared them in clusters, whose cost is from six products measured later.
struct HopperModel {
  static constexpr double kAlone = 2.5;     // shares that a multiprocessor gets from an idle L2,
  static constexpr double kTogether = 2.3;  // and each when all read from it
  static constexpr double kRecordCost = 2 << 10;
  static constexpr double kMeetingCost = 96 << 10;
  static constexpr double kPartCost = 3;  // for each byte of sums that are left to another block

  int64_t m, n, k;
  DType dtype;  // of the weights
  const CudaDevice& device;

  double records() const { return static_cast<double>(ceil_div(k, kFragmentColumns)); }

  double stream(const CudaGemmConfig& config) const {
    const double record_bytes = 4.0 * static_cast<double>(fragment_words(dtype));
    const int64_t tiles = stream_tiles(config, m, n);
    const double work = static_cast<double>(tiles) * records();
    // Of more blocks than multiprocessors, some wait for others.
    const auto rounds = static_cast<double>(ceil_div(config.blocks, device.multiprocessors));
    const double share = rounds * std::ceil(work / config.blocks);
    const int64_t busy = std::min(config.blocks, device.multiprocessors);
    const double rate =
        std::min(kAlone, kTogether * device.multiprocessors / static_cast<double>(busy));
    const double bytes = config.tile_n / kFragmentRows * record_bytes +
                         static_cast<double>(config.tile_m * kFragmentColumns * x_size(dtype));
    // Tiles with the same weights run beside each other, unless there are more than blocks: then
    // the weights come again when the L2 has others.
    const double weights =
        static_cast<double>(ceil_div(n, kFragmentRows)) * records() * record_bytes;
    const bool again = tiles > busy && weights > static_cast<double>(device.l2_bytes) / 2;
    const double dram = weights * static_cast<double>(again ? ceil_div(m, config.tile_m) : 1) /
                        device.multiprocessors;
    const double meeting = tiles % config.blocks == 0
                               ? 0
                               : kMeetingCost + kPartCost * 4 * config.tile_n * config.tile_m *
                                                    std::ceil(records() / share);
    return std::max(dram, share * (bytes / rate + kRecordCost)) + meeting;
  }

  // What a record of a tile was measured to take.
  double wgmma(const CudaGemmConfig& config) const {
    const bool wide = size_of(dtype) == 2;
    const double record = config.tile_m == 256   ? (wide ? 60e3 : 39e3)
                          : config.tile_n == 256 ? (wide ? 86e3 : 44e3)
                                                 : (wide ? 48e3 : 34e3);
    const int64_t tiles = ceil_div(n, config.tile_n) * ceil_div(m, config.tile_m);
    return static_cast<double>(ceil_div(tiles, config.blocks)) * records() * record;
  }

  double cost(const CudaGemmConfig& config) const {
    return config.kernel == CudaKernel::kStream ? stream(config) : wgmma(config);
  }
};

constexpr int64_t kMaxGridBlocks = (int64_t{1} << 31) - 1;

// Calls consider(config) for the ways that are worth considering.
template <class Consider>
void for_each_hopper_way(int64_t m, int64_t n, int64_t k, DType dtype, const CudaDevice& device,
                         const Consider& consider) {
  // The kernel for large tiles has them of 256 x 128, 128 x 256 and 128 x 128 (rows of W x rows of
  // x), one block a multiprocessor that computes tile after tile.
  constexpr struct {
    int n, m;
  } kTiles[] = {{128, 256}, {256, 128}, {128, 128}};
  for (const auto& tile : kTiles) {
    if (dtype == DType::kUInt8) break;  // which it does not multiply
    CudaGemmConfig config{CudaKernel::kWgmma, tile.n, tile.m, 1, 1, device.multiprocessors};
    const int64_t tiles = ceil_div(n, tile.n) * ceil_div(m, tile.m);
    config.blocks = static_cast<int>(ceil_div(tiles, ceil_div(tiles, device.multiprocessors)));
    consider(config);
  }
  for (const int tile_m : {16, 32, 64, 128}) {
    if (tile_m > 16 && tile_m / 2 >= m) break;  // half of it or more would be empty
    CudaGemmConfig config{CudaKernel::kStream, kStreamTileN, tile_m, 1, 1, 1};
    const int64_t tiles = stream_tiles(config, m, n);
    const int64_t most =
        std::min<int64_t>(device.multiprocessors, tiles * ceil_div(k, kFragmentColumns));
    // Every multiprocessor with whole tiles, with equal parts of tiles, and with as much as any
    // other; or a block for each tile, where there are too many to be shared.
    for (const int64_t blocks :
         {std::min(tiles, most), std::max<int64_t>(most / tiles, 1) * tiles, most, tiles}) {
      if (blocks > kMaxGridBlocks) continue;
      config.blocks = static_cast<int>(blocks);
      if (is_legal_stream(config, m, n, k)) consider(config);
    }
  }
}

// The cheapest way by the model; of tile_n 0 where there is none.
inline CudaGemmConfig hopper_config(int64_t m, int64_t n, int64_t k, DType dtype,
                                    const CudaDevice& device) {
  const HopperModel model{m, n, k, dtype, device};
  CudaGemmConfig best{};
  double least = 0;
  for_each_hopper_way(m, n, k, dtype, device, [&](const CudaGemmConfig& config) {
    const double cost = model.cost(config);
    if (best.tile_n != 0 && cost >= least) return;
    best = config;
    least = cost;
  });
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

constexpr int kFewRows = 16;

// `dtype` is that of the weight's values (kUInt8: int4), which the device has a product of; all of
// m, n and k are at least 1. There is no prefill kernel for int4 weights: decode's takes any m.
inline CudaGemmConfig choose_cuda_gemm_config(int64_t m, int64_t n, int64_t k, DType dtype,
                                              const CudaDevice& device) {
  if (dtype == DType::kFloat32) return choose_float32_config(m, n, k, device);
  const bool is_int4 = dtype == DType::kUInt8;
  if (device.capability == 90) {
    const CudaGemmConfig hopper = hopper_config(m, n, k, dtype, device);
    // Up to 16 rows mma.sp may be the faster. Of int8 and int4 it always was, more than its model
    // says.
    const bool exists = hopper.tile_n != 0;  // of int4 not for 2^40 rows
    if (exists && (m > kFewRows || dtype == DType::kE4M3)) return hopper;
    const CudaGemmConfig decode = decode_config(m, n, k, dtype, device);
    const bool is_faster = !exists || is_int4 || dtype == DType::kInt8 ||
                           DecodeModel{m, n, k, dtype, device}.cost(decode) <=
                               HopperModel{m, n, k, dtype, device}.cost(hopper);
    return is_faster ? decode : hopper;
  }
  if (m <= kDecodeRows || is_int4 || fills_few(m, n, device)) {
    return decode_config(m, n, k, dtype, device);
  }
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
      return dtype != DType::kFloat32 && device.capability == 90 &&
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
    case CudaKernel::kWgmma: return "many rows on Hopper: bound by the L2 and arithmetic";
    case CudaKernel::kFloat32: return "exact float32, which tensor cores do not multiply";
    case CudaKernel::kStream:
      return m > kDecodeRows ? "rows that fill no large tiles on Hopper"
                             : "few rows on Hopper: bound by reading the weights once";
  }
  return "?";
}

}  // namespace gossamer::sparse24
