#pragma once
// How a GEMM is cut up: a pure function of the shape, the target and the threads.
#include <cstdint>

#include "common/dtype.h"
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
  int threads;
};

struct TargetTraits {
  int lanes;           // 32-bit lanes of a register
  int few_rows_limit;  // up to this m few_rows is the faster one (measured on Zen 5)
};

constexpr TargetTraits traits(Target target) {
  switch (target) {
    case Target::kAVX2: return {8, 32};
    case Target::kAVX512:
    case Target::kAVX512BF16: return {16, 56};
    case Target::kSerial: break;
  }
  return {1, 0};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The panel of x that a pass keeps in L1. 37 KiB (three quarters of 48) beat 24 KiB where measured;
// on a 32 KiB cache a part of it comes from L2.
constexpr int64_t kPanelBytes = 37 << 10;
// A task's partial sums stay in L2.
constexpr int64_t kPartialSumBytes = 256 << 10;
// Below this many multiply-adds a second thread costs more than it brings (about 2 us to wake it).
constexpr int64_t kWorkPerThread = 1 << 16;

// Every sum of many_rows runs through its records in order, however the rows are cut.
inline GemmConfig many_rows_config(int64_t m, int64_t n, DType dtype, Target target, int team) {
  const TargetTraits t = traits(target);
  const int64_t blocks = ceil_div(n, kBlockN);
  // Tiles as equal as they get: 64 vectors are 6 tiles of 11 or 10, not 5 of 12 and one of 4.
  const int64_t vectors = ceil_div(m, t.lanes);
  const int64_t tiles = ceil_div(vectors, max_many_vectors(t.lanes));
  const int tile = static_cast<int>(ceil_div(vectors, tiles));
  // bf16 dot products read pairs of columns: six possible pairs of 32 bits for every four columns.
  const bool pairs = target == Target::kAVX512BF16 && dtype == DType::kBFloat16;
  const int64_t record_bytes = (pairs ? 6 * kRecordGroups : kRecordK) * 4 * t.lanes * tile;
  int64_t fitting = kPanelBytes / record_bytes;
  fitting = fitting < 1 ? 1 : fitting > kMaxRecordsPerPass ? kMaxRecordsPerPass : fitting;
  const int64_t block_bytes = kBlockN * 4 * t.lanes * tile;
  const int64_t fair =
      ceil_div(blocks * tiles, 4 * team) < blocks ? ceil_div(blocks * tiles, 4 * team) : blocks;
  const int64_t cached = kPartialSumBytes / block_bytes < 1 ? 1 : kPartialSumBytes / block_bytes;
  return {Kernel::kManyRows, tile, tiles, fitting, fair < cached ? fair : cached, team};
}

inline GemmConfig choose_gemm_config(int64_t m, int64_t n, int64_t k, DType dtype, Target target,
                                     int threads) {
  const int64_t blocks = ceil_div(n, kBlockN), records = ceil_div(k, kRecordK);
  const int64_t work = m * blocks * kBlockN * records * (kRecordK / 2);
  const int64_t useful = work / kWorkPerThread < 1 ? 1 : work / kWorkPerThread;
  const int team = threads < 1 ? 1 : static_cast<int>(threads < useful ? threads : useful);
  if (target == Target::kSerial || dtype == DType::kFloat64) {
    return {Kernel::kSerial, 1, m, records, blocks, 1};
  }
  const TargetTraits t = traits(target);
  if (m <= t.few_rows_limit) {
    const int64_t tiles = ceil_div(m, max_few_rows(t.lanes));
    return {Kernel::kFewRows, static_cast<int>(ceil_div(m, tiles)), tiles, records, blocks, team};
  }
  return many_rows_config(m, n, dtype, target, team);
}

}  // namespace gossamer::sparse24
