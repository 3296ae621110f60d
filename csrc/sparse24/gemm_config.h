#pragma once
// How a GEMM is cut up: a pure function of the shape, the target and the threads.
#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/target.h"
#include "sparse24/gemm_unit.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

// few_rows:  16 outputs a register; x is selected in the register by the 2-bit indices. The weights
//            stream once, so it suits the bandwidth-bound small batch. A tile is `tile` rows of x.
// many_rows: a register holds one column of x for as many rows as it has lanes; the kept weight is
//            broadcast and multiplied straight from the panel of x in L1, whose address the index
//            gives. No shuffle, so it suits the arithmetic-bound batch. A tile is `tile` registers
//            of rows, `records_per_pass` records of K at a time.
enum class Kernel : uint8_t { kSerial, kFewRows, kManyRows };

struct GemmConfig {
  Kernel kernel;
  int tile;
  int64_t tiles;             // over m
  int64_t records_per_pass;  // many_rows: the depth of x that stays in L1
  int64_t blocks_per_task;   // many_rows: the blocks of 16 outputs one task covers
  bool spread_fetch;         // many_rows: weights are fetched ahead output by output, not at once
  int threads;
};

// Up to so many rows of x few_rows is the faster kernel. It shuffles once for each multiply-add.
// Intel's cores do one shuffle a cycle (and, of 512 bits, on one of the two ports that multiply),
// hence one multiply-add a cycle at best, and many_rows passes it earlier.
struct FewRowsLimits {
  int zen;    // measured on Zen 5
  int intel;  // measured on Emerald Rapids
};

struct TargetTraits {
  int lanes;  // 32-bit lanes of a register; rows of a tile
  FewRowsLimits few_rows;
};

constexpr TargetTraits traits(Target target) {
  switch (target) {
    case Target::kAVX2: return {8, {32, 14}};
    case Target::kAVX512:
    case Target::kAVX512BF16:
    case Target::kAMXBF16: return {16, {56, 28}};
    case Target::kSerial: break;
  }
  return {1, {0, 0}};
}

// Whether a kept pair is one dot product, rather than two multiply-adds.
constexpr bool by_pairs(Target target, DType dtype) {
  return target == Target::kAVX512BF16 && dtype == DType::kBFloat16;
}

// Whether many_rows goes by AMX tiles.
constexpr bool by_tiles(Target target, DType dtype) {
  return target == Target::kAMXBF16 && dtype != DType::kFloat32;
}

constexpr int few_rows_limit(Target target, DType dtype, bool intel) {
  if (by_tiles(target, dtype)) return dtype == DType::kBFloat16 ? 1 : 8;  // on Emerald Rapids
  const FewRowsLimits limits = traits(target).few_rows;
  // Intel does one dot product a cycle as well, on another port than the shuffle.
  return intel && !by_pairs(target, dtype) ? limits.intel : limits.zen;
}

// The panel of x that a pass keeps in L1. 37 KiB (three quarters of 48) beat 24 KiB where measured;
// on a 32 KiB cache a part of it comes from L2.
constexpr int64_t kPanelBytes = 37 << 10;
// A task's partial sums stay in L2.
constexpr int64_t kPartialSumBytes = 384 << 10;
// Of AMX: a pass of x, which is read again for every 32 outputs, and the sums between passes share
// the L2 (2 MiB where there is AMX).
constexpr int64_t kTileBytes = 1 << 10, kTilePassBytes = 640 << 10, kTileSumBytes = 640 << 10;

// Of all ways to cut m into tiles and n into tasks, the one whose busiest thread issues the fewest
// loads: they are what bounds the kernel (two a cycle; its multiply-adds read x from memory). Every
// sum runs through its records in order, however the rows and outputs are cut.
//
// Fetching a block's weights at once is best on Zen 5 (output by output costs 7 % where they lie in
// the caches). On Emerald Rapids such a burst waits for the core's 16 fill buffers and holds up the
// multiply-adds: output by output is 8 to 14 % faster from the L3, and as fast from the L2.
inline GemmConfig vectors_config(int64_t m, int64_t n, DType dtype, Target target, bool intel,
                                 int team) {
  const int64_t lanes = traits(target).lanes;
  const int64_t vectors = ceil_div(m, lanes), blocks = ceil_div(n, kBlockN);
  // bf16 dot products read pairs of columns: six possible pairs of 32 bits for every four columns.
  const bool pairs = by_pairs(target, dtype);
  const int64_t weights = pairs ? kRecordGroups : 2 * kRecordGroups;  // of an output in a record
  const int64_t panel_rows = pairs ? 6 * kRecordGroups : kRecordK;
  // Measured, in loads, for a record: packing one register's rows; and, for one output, computing
  // its offsets and bringing its weights from the L3.
  constexpr int64_t kPackLoads = 300, kOutputLoads = 8;

  GemmConfig best{};
  double least = 0;
  for (int64_t tiles = ceil_div(vectors, max_many_vectors(lanes)); tiles <= vectors; ++tiles) {
    const int64_t tile = ceil_div(vectors, tiles);
    const int64_t depth =
        std::clamp<int64_t>(kPanelBytes / (panel_rows * 4 * lanes * tile), 1, kMaxRecordsPerPass);
    const int64_t fewest_tasks = ceil_div(blocks * kBlockN * 4 * lanes * tile, kPartialSumBytes);
    for (int64_t share = 0; share <= 4; ++share) {  // 0: as few tasks as the caches allow
      const int64_t wanted = std::max(fewest_tasks, share * team / tiles);
      const int64_t task_blocks = ceil_div(blocks, std::min(wanted, blocks));
      const int64_t tasks = ceil_div(blocks, task_blocks) * tiles;
      const int64_t output_loads = weights * (tile + 1) + 2 * tile / depth + kOutputLoads;
      const int64_t task_loads = task_blocks * kBlockN * output_loads + kPackLoads * tile;
      const double loads = static_cast<double>(ceil_div(tasks, team)) * task_loads;
      if (least == 0 || loads < least) {
        least = loads;
        best = {Kernel::kManyRows, static_cast<int>(tile), tiles, depth, task_blocks, intel, team};
      }
    }
    tiles = tile == 1 ? tiles : std::max(tiles, ceil_div(vectors, tile - 1) - 1);
  }
  return best;
}

// The same for tiles, in cycles: those of the tile unit, plus what else the core does in between.
inline GemmConfig tiles_config(int64_t m, int64_t n, int64_t k, DType dtype, int team) {
  const TileTerms of = tile_terms(dtype);
  const int64_t row_tiles = ceil_div(m, 16), blocks = ceil_div(n, kBlockN);
  const int64_t pairs = ceil_div(blocks, 2), records = ceil_div(k, kRecordK);
  // Measured on Emerald Rapids, for a record: a product of two tiles whose operands come from L2;
  // expanding a block of weights that comes from the L3; packing 16 rows of x. And a tile of sums,
  // stored and loaded between passes or finished.
  constexpr double kProduct = 28, kSums = 300;
  const double expand = of.terms == 1 ? 60 : 90, pack = 60.0 * of.terms;

  GemmConfig best{};
  double least = 0;
  const auto consider = [&](int64_t tile, int64_t deepest) {
    const int64_t passes = ceil_div(records, deepest), depth = ceil_div(records, passes);
    if (tile > 2 && tile * depth * of.terms * kTileBytes > kTilePassBytes) return;
    const int64_t row_tasks = ceil_div(row_tiles, tile);
    const int64_t sum_bytes = passes == 1 ? 0 : blocks * tile * kTileBytes;
    for (int64_t share = 0; share <= 4; ++share) {  // 0: as few tasks as the caches allow
      const int64_t wanted =
          std::max<int64_t>({1, ceil_div(sum_bytes, kTileSumBytes), share * team / row_tasks});
      const int64_t task_pairs = ceil_div(pairs, std::min(wanted, pairs));
      const int64_t task_blocks = std::min(2 * task_pairs, blocks);
      const double products = tile * kProduct * of.products;
      const double block = records * (products + expand) + passes * tile * kSums;
      const double task = task_blocks * block + records * tile * pack;
      const int64_t tasks = row_tasks * ceil_div(blocks, task_blocks);
      const double cycles = ceil_div(tasks, team) * task;
      if (least == 0 || cycles < least) {
        least = cycles;
        best = {
            Kernel::kManyRows, static_cast<int>(tile), row_tasks, depth, task_blocks, false, team};
      }
    }
  };
  for (int64_t parts = 1; parts <= row_tiles; parts = parts < 2 * team ? parts + 1 : parts * 2) {
    const int64_t tile = ceil_div(row_tiles, parts);
    // One pair of tiles keeps its sums in registers, however deep x is.
    if (tile <= 2) consider(tile, records);
    for (int64_t depth = kTileDepth; tile > 2 && depth >= kTileDepth / 8; depth /= 2) {
      consider(tile, depth / of.terms);
    }
  }
  return best;
}

inline GemmConfig many_rows_config(int64_t m, int64_t n, int64_t k, DType dtype, Target target,
                                   bool intel, int team) {
  return by_tiles(target, dtype) ? tiles_config(m, n, k, dtype, team)
                                 : vectors_config(m, n, dtype, target, intel, team);
}

inline GemmConfig choose_gemm_config(int64_t m, int64_t n, int64_t k, DType dtype, Target target,
                                     bool intel, int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), records = ceil_div(k, kRecordK);
  const double work = static_cast<double>(m) * (blocks * kBlockN * records * (kRecordK / 2));
  const int team = threads_for_work(threads, work);
  if (target == Target::kSerial || dtype == DType::kFloat64) {
    return {Kernel::kSerial, 1, m, records, blocks, false, 1};
  }
  if (m <= few_rows_limit(target, dtype, intel)) {
    const int64_t tiles = ceil_div(m, max_few_rows(traits(target).lanes));
    return {Kernel::kFewRows,
            static_cast<int>(ceil_div(m, tiles)),
            tiles,
            records,
            blocks,
            false,
            team};
  }
  return many_rows_config(m, n, k, dtype, target, intel, team);
}

}  // namespace gossamer::sparse24
