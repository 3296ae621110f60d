#pragma once
// How a GEMM on a GPU may be cut up, and the best way to for the tensor-core kernels with portable
// instructions: pure functions of shape, dtype and device.
#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/cuda.h"
#include "common/dtype.h"

namespace gossamer::sparse24 {

// A record of Fragments (cuda.h).
constexpr int kFragmentRows = 16;
constexpr int kFragmentColumns = 256;

constexpr int64_t fragment_words(DType dtype) {  // of one record; kUInt8: int4
  const int64_t bits = dtype == DType::kUInt8 ? 4 : 8 * size_of(dtype);
  return (kFragmentRows * kFragmentColumns / 2 * bits / 8 + 32 * 16) / 4;
}

// Bytes of an element of x beside weights of this type: int4 ones meet 16-bit floats.
constexpr int64_t x_size(DType dtype) { return dtype == DType::kUInt8 ? 2 : size_of(dtype); }

// decode:  few rows of x. Bound by reading the weights once, so warps stream them from global
//          memory into registers, and x lies in shared memory.
// prefill: many rows of x. Bound by arithmetic, tiles of both operands go through shared memory.
// wgmma:   prefill with Hopper's instructions.
// stream:  decode with Hopper's instructions, and for rows of x that fill no large tiles.
// float32: exact, without tensor cores.
enum class CudaKernel : uint8_t { kDecode, kPrefill, kWgmma, kFloat32, kStream };

static constexpr const char* name(CudaKernel kernel) {
  switch (kernel) {
    case CudaKernel::kDecode: return "decode";
    case CudaKernel::kPrefill: return "prefill";
    case CudaKernel::kWgmma: return "wgmma";
    case CudaKernel::kFloat32: return "float32";
    case CudaKernel::kStream: return "stream";
  }
  return "?";
}

struct CudaGemmConfig {
  CudaKernel kernel;
  int tile_n;   // rows of the weight a block computes
  int tile_m;   // rows of x a block computes
  int warps_k;  // decode: warps of a block that share rows, each with records of its own
  int split_k;  // blocks that share a tile; above 1 their sums meet in the workspace
  // wgmma: at most that many, each for one tile after another; 0: one for each tile.
  // stream: so many, which share all records of all tiles evenly.
  int blocks = 0;

  int64_t workspace_bytes(int64_t m, int64_t n) const;
};

inline int64_t stream_tiles(const CudaGemmConfig& config, int64_t m, int64_t n) {
  return ceil_div(n, config.tile_n) * ceil_div(m, config.tile_m);
}

// decode: [tile of n][split][m][tile_n] sums of 4 bytes; rows past n of the last tile are not
// touched. stream: [block][2][tile_n][tile_m], unless every block has whole tiles.
inline int64_t CudaGemmConfig::workspace_bytes(int64_t m, int64_t n) const {
  if (kernel == CudaKernel::kStream) {
    const bool whole = stream_tiles(*this, m, n) % blocks == 0;
    return whole ? 0 : int64_t{2} * blocks * tile_n * tile_m * 4;
  }
  return split_k == 1 ? 0 : ceil_div(n, tile_n) * split_k * m * tile_n * 4;
}

// Tiles whose blocks along K wait for each other, at most: K is split to fill the multiprocessors,
// at most four times, so no more tiles than twice as many as those are ever split.
constexpr int kCudaCounters = 1024;
constexpr int64_t kMaxWorkspaceBytes = int64_t{32} << 20;

// ---- decode -------------------------------------------------------------------------------------

constexpr int kDecodeRows = 64;  // of x, at most; with int4 weights a block's, of any number
constexpr int kDecodeWarps = 8;
// Stages of x: while one is read, two are on their way, which covers the latency of the L2.
constexpr int kDecodeStages = 3;
// All stages together take 96 KB: two such blocks fit a Hopper's multiprocessor, one any other's.
// Beside int4 weights, which are in shared memory, too, they take 24, unless one slice is larger.
constexpr int64_t decode_stage_bytes(DType dtype) {
  return (dtype == DType::kUInt8 ? 8 : 32) << 10;
}

constexpr int decode_tile_m(int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }

// Tiles of 16 rows of a warp. At 64 rows of x a warp with one tile would read 32 KB of x from
// shared memory for each 4.5 KB of weights, more than the multiprocessor's 128 bytes a cycle allow
// while the weights come at full speed; two tiles use what is read twice. A record of int4 weights
// is 1.5 KB, so they need two tiles at once, also to have enough of them on their way, and more at
// 32 rows, where there are registers for three; at 64 there are for two, and x sets the pace.
constexpr int decode_row_tiles(int tile_m, DType dtype) {
  if (dtype == DType::kUInt8) return tile_m == 32 ? 3 : 2;
  return tile_m == 64 ? 2 : 1;
}

// Blocks that a multiprocessor has registers for: above 128 a thread, one. Its additional row tile
// keeps about as many bytes on their way as a second block would.
constexpr int decode_blocks(int tile_m, DType dtype) {
  return tile_m == 64 || decode_row_tiles(tile_m, dtype) == 3 ? 1 : 2;
}

constexpr int decode_tile_n(int tile_m, int warps_k, DType dtype) {
  return kFragmentRows * decode_row_tiles(tile_m, dtype) * kDecodeWarps / warps_k;
}

// Of a row of x, what a warp multiplies between two looks at the stages: two steps of mma.sp, or
// four, for which 16 bytes a lane hold the int4 weights.
constexpr int decode_chunk_bytes(DType dtype) { return dtype == DType::kUInt8 ? 256 : 128; }

// int4 weights wait in shared memory, where each warp brings its own so many chunks before it
// multiplies them: of two row tiles 3 KB for 256 columns, which are too few on their way one record
// ahead, since widening them takes long. The tiles for more rows of x have more to do with each.
constexpr int decode_chunks_ahead(int tile_m) { return tile_m <= 16 ? 4 : 2; }
// A chunk of a row tile there, of each lane 16 bytes of weights, 8 of metadata, and up to 8 of the
// scales of the tile's rows.
constexpr int kDecodeChunkBytes = 1024;

constexpr int64_t decode_ring_bytes(int tile_m, DType dtype) {
  if (dtype != DType::kUInt8) return 0;
  return int64_t{kDecodeWarps} * decode_row_tiles(tile_m, dtype) * decode_chunks_ahead(tile_m) *
         kDecodeChunkBytes;
}

// A stage holds, for every row of x and each of the warps_k warps along K, this much: what the warp
// multiplies with a whole record, or as much of it as fits, a chunk at least; with few rows it is
// up to four records, because at every new stage the warps of a block wait for each other.
// Weights that are asked for in chunks must not be so two stages before their x (decode() counts
// both in the same groups), so that a slice is half of the chunks that are ahead.
constexpr int decode_slice_bytes(int64_t m, DType dtype, int warps_k) {
  const int record = static_cast<int>(kFragmentColumns * x_size(dtype));
  const int chunks = dtype == DType::kUInt8 ? decode_chunks_ahead(decode_tile_m(m)) / 2 : 1;
  int slice = 4 * record;
  while (slice > chunks * decode_chunk_bytes(dtype) &&
         m * warps_k * slice > decode_stage_bytes(dtype)) {
    slice /= 2;
  }
  return slice;
}

// Sums are stored as [row of x][row of W], and each row is padded by 16 bytes so that the lanes of
// a fragment write to different banks.
constexpr int kSumPadding = 4;

// `m`: the rows of x of a block, at most tile_m.
constexpr int64_t decode_shared_bytes(int64_t m, DType dtype, int tile_m, int warps_k) {
  const int64_t x = kDecodeStages * m * warps_k * decode_slice_bytes(m, dtype, warps_k);
  const int64_t sums =
      int64_t{warps_k} * tile_m * (decode_tile_n(tile_m, warps_k, dtype) + kSumPadding) * 4;
  return std::max(x, sums) + decode_ring_bytes(tile_m, dtype);
}

// A model of the time, in bytes at a multiprocessor's share of the DRAM bandwidth (33 KB are about
// 1 us on an H200):
//
//   the longer of  all weights, spread evenly                          the DRAM's time,
//             and  what the busiest multiprocessor reads and writes    its own time, at its rate,
//   plus, with split_k > 1, a fence and the last block's sum of all partial sums of its tile
//
// A multiprocessor's rate is bounded by the L2 (kL2Rate shares) and by what its warps have in
// flight: each has one record of each of its row tiles on its way, of int4 weights up to two. The
// constants are those with which the model chose best on an H200: of some 30 ways to cut up each of
// 21 products of up to 16 rows it took ones that were within 1 % of the fastest in the mean, and
// within 8 %.
struct DecodeModel {
  static constexpr double kL2Rate = 1.5;
  static constexpr double kInFlight = 48 << 10;      // bytes for a rate of one share
  static constexpr double kBlockCost = 8 << 10;      // to start blocks and fill their pipelines
  static constexpr double kMeetingCost = 128 << 10;  // about 4 us: a fence, an atomic, loads

  int64_t m, n, k;
  DType dtype;  // of the weights
  const CudaDevice& device;

  int64_t block_m() const { return std::min<int64_t>(m, kDecodeRows); }
  int64_t tiles(const CudaGemmConfig& config) const {  // each with a counter
    return ceil_div(n, config.tile_n) * ceil_div(m, config.tile_m);
  }
  int64_t records() const { return ceil_div(k, kFragmentColumns); }

  int resident_blocks(int tile_m, int warps_k) const {
    const int64_t bytes =
        decode_shared_bytes(block_m(), dtype, tile_m, warps_k) + 1024;  // CUDA's own
    return static_cast<int>(
        std::clamp<int64_t>((device.shared_bytes + 1024) / bytes, 1, decode_blocks(tile_m, dtype)));
  }

  double cost(const CudaGemmConfig& config) const {
    const double record_bytes = 4.0 * static_cast<double>(fragment_words(dtype));
    const int64_t blocks = tiles(config) * config.split_k;
    const int64_t row_tiles = ceil_div(std::min<int64_t>(n, config.tile_n), kFragmentRows);
    const int64_t depth = ceil_div(records(), config.split_k);
    const int64_t waves = ceil_div(blocks, device.multiprocessors);

    const auto weights = static_cast<double>(row_tiles * depth) * record_bytes;
    const auto x = static_cast<double>(block_m() * depth * kFragmentColumns * x_size(dtype));
    const auto partial =
        static_cast<double>(config.split_k > 1 ? block_m() * config.tile_n * 4 : 0);
    const int64_t ahead =  // records of a warp
        dtype == DType::kUInt8 ? decode_chunks_ahead(config.tile_m) / 2 : 1;
    const double in_flight =
        static_cast<double>(row_tiles * std::min<int64_t>(config.warps_k * ahead, depth)) *
        record_bytes;
    // So many blocks of a multiprocessor at a time, as many times as it takes.
    const auto round = [&](int64_t count) {
      if (count == 0) return 0.0;
      const auto together = static_cast<double>(count);
      const double rate = std::min(kL2Rate, together * in_flight / kInFlight);
      return together * (weights + x + partial) / rate + kBlockCost;
    };
    const int64_t resident = resident_blocks(config.tile_m, config.warps_k);
    const double busiest =
        static_cast<double>(waves / resident) * round(resident) + round(waves % resident);
    const double dram = static_cast<double>(ceil_div(n, kFragmentRows) * records()) * record_bytes /
                        device.multiprocessors;
    const double meeting =
        config.split_k > 1 ? kMeetingCost + config.split_k * partial / kL2Rate : 0.0;
    return std::max(dram, busiest) + meeting;
  }

  bool is_legal(const CudaGemmConfig& config) const {
    return decode_shared_bytes(block_m(), dtype, config.tile_m, config.warps_k) <=
               device.shared_bytes &&
           (config.split_k == 1 ||
            (tiles(config) <= kCudaCounters && config.workspace_bytes(m, n) <= kMaxWorkspaceBytes));
  }
};

// The cheapest by the model. Of the ways to split K only those are tried that fill the
// multiprocessors one to four times: the model is called about 20 times, well under a microsecond.
inline CudaGemmConfig decode_config(int64_t m, int64_t n, int64_t k, DType dtype,
                                    const CudaDevice& device) {
  const DecodeModel model{m, n, k, dtype, device};
  const int tile_m = decode_tile_m(m);
  // One warp along K and no split needs the least shared memory, and every device has it.
  CudaGemmConfig best{CudaKernel::kDecode, decode_tile_n(tile_m, 1, dtype), tile_m, 1, 1};
  double best_cost = model.cost(best);
  for (int warps_k = 1; warps_k <= kDecodeWarps; warps_k *= 2) {
    const int tile_n = decode_tile_n(tile_m, warps_k, dtype);
    const int64_t tiles = model.tiles({CudaKernel::kDecode, tile_n, tile_m, warps_k, 1});
    const int64_t records = model.records();
    for (int fill = 0; fill <= 4; ++fill) {
      const int64_t wanted = int64_t{fill} * device.multiprocessors / tiles;
      const int64_t split = std::clamp<int64_t>(wanted, 1, records);
      const int64_t depth = ceil_div(records, split);
      const CudaGemmConfig config{CudaKernel::kDecode, tile_n, tile_m, warps_k,
                                  static_cast<int>(ceil_div(records, depth))};
      if (!model.is_legal(config)) continue;
      const double cost = model.cost(config);
      if (cost < best_cost) {
        best = config;
        best_cost = cost;
      }
    }
  }
  return best;
}

// ---- stream (Hopper) ----------------------------------------------------------------------------

constexpr int kStreamTileN = 128;
constexpr int kStreamCounters = 2;  // of a tile: its two halves are finished each by itself

inline bool is_legal_stream(const CudaGemmConfig& c, int64_t m, int64_t n, int64_t k) {
  const bool has_tile = c.tile_m == 16 || c.tile_m == 32 || c.tile_m == 64 || c.tile_m == 128;
  if (c.tile_n != kStreamTileN || !has_tile || c.blocks < 1) return false;
  const int64_t tiles = stream_tiles(c, m, n), bytes = c.workspace_bytes(m, n);
  return c.blocks <= tiles * ceil_div(k, kFragmentColumns) && tiles < int64_t{1} << 30 &&
         (bytes == 0 || (bytes <= kMaxWorkspaceBytes && kStreamCounters * tiles <= kCudaCounters));
}

// ---- prefill ------------------------------------------------------------------------------------

constexpr int kPrefillTileN = 128;
constexpr int kPrefillStages = 4;
constexpr int kPrefillStepBytes = 128;  // of a row of x: two steps of mma.sp

constexpr int64_t prefill_shared_bytes(int tile_m) {  // a stage: a step of x and of the weights
  return int64_t{kPrefillStages} * (tile_m + kPrefillTileN / 2) * kPrefillStepBytes;
}

// A tile of 256 rows of x reads a quarter less from shared memory for each product than one of 128,
// so it is taken unless the smaller one leaves fewer multiprocessors idle by more than that.
inline CudaGemmConfig prefill_config(int64_t m, int64_t n, const CudaDevice& device) {
  constexpr double kSmallTileCost = 1.2;
  const auto config = [](int tile_m) {
    return CudaGemmConfig{CudaKernel::kPrefill, kPrefillTileN, tile_m, 1, 1};
  };
  if (prefill_shared_bytes(256) > device.shared_bytes) return config(128);
  const auto waves = [&](int tile_m) {
    const int64_t blocks = ceil_div(n, kPrefillTileN) * ceil_div(m, tile_m);
    return static_cast<double>(ceil_div(blocks, device.multiprocessors));
  };
  return config(128 * kSmallTileCost * waves(128) < 256 * waves(256) ? 128 : 256);
}

}  // namespace gossamer::sparse24
