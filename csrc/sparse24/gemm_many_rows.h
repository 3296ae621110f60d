#pragma once
// many_rows: y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]), as many rows at a time as the registers
// of a tile have lanes.
//
//   panel of x, in L1     column 0 | x[m, 0] | x[m+1, 0] | ...   transposed by pack()
//                         column 1 | x[m, 1] | x[m+1, 1] | ...
//   a kept weight         | W[n, k] | W[n, k] | ...              broadcast; k names the panel's row
//   sums                  | y[m, n] | y[m+1, n] | ...            of each register of the tile
#include "sparse24/gemm_ends.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct ManyRows {
  using Ends = GemmEnds<S, T, Multiply>;
  using F = typename Ends::F;
  using X = typename Ends::X;

  template <int Vectors>
  static void pack(const XRows& x, int64_t begin, int64_t end, uint32_t* packed) {
    constexpr int64_t stride = Vectors * S::kLanes;
    for (int64_t record = begin; record < end; ++record) {
      uint32_t* panel = packed + (record - begin) * Multiply::kPanelRows * stride;
      for (int vector = 0; vector < Vectors; ++vector, panel += S::kLanes) {
        const int64_t row = vector * S::kLanes, k = record * kRecordK;
        if constexpr (sizeof(X) == sizeof(T)) {
          if (row + S::kLanes <= x.rows && k + kRecordK <= x.k) {
            const X* rows = static_cast<const X*>(x.data) + row * x.stride + k;
            Multiply::pack_record(rows, x.stride, stride, panel);
            continue;
          }
        }
        alignas(64) X rows[S::kLanes][kRecordK];
        for (int i = 0; i < S::kLanes; ++i) Ends::fetch(x, row + i, k, rows[i]);
        Multiply::pack_record(rows[0], kRecordK, stride, panel);
      }
    }
  }

  // The weights to come, in lines of 64 bytes; some are fetched with each step of outputs.
  struct Fetch {
    const uint32_t* next;
    const uint32_t* end;
    int64_t lines_a_step;
    void step() {
      for (int64_t i = 0; i < lines_a_step && next < end; ++i, next += kBlockN) {
        __builtin_prefetch(next, 0, 3);
      }
    }
  };

  // One pass: 16 outputs of a block against all rows of the tile, over `records` records of K.
  //
  // A multiply-add reads x from memory, so the loads are the limit: (Vectors + 1) of them for
  // Vectors multiply-adds. Their addresses must never be late, and must not come through integer
  // loads, which take the same ports: the offsets of an output's next record are computed in vector
  // registers while this one is multiplied, and move to integer registers four at a time, four
  // steps ahead.
  template <int Vectors, int Outputs>
  static void multiply_block(const uint32_t* words, const uint32_t* weights, int64_t records,
                             const char* panel, bool first_pass, float* sums, Fetch ahead) {
    constexpr int kRowBytes = Vectors * S::kLanes * sizeof(float);
    constexpr int kQuads = Multiply::kSteps / 4;
    typename S::H offsets[Outputs], next_offsets[Outputs];
    uint64_t quad[Outputs], next_quad[Outputs];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) {
      offsets[o] = Multiply::template offsets<kRowBytes>(words + o, 0);
      quad[o] = S::quad(offsets[o], 0);
    }
    for (int first = 0; first < kBlockN; first += Outputs, sums += Outputs * Vectors * S::kLanes) {
      ahead.step();
      F sum[Outputs][Vectors];
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) {
          sum[o][v] = first_pass ? S::zero() : S::load(sums + (o * Vectors + v) * S::kLanes);
        }
      }
      for (int64_t record = 0; record < records; ++record) {
        const uint32_t* weight = S::opaque(weights + record * Multiply::kWeightWords + first);
        const bool last = record + 1 == records;
        const int64_t next = last ? 0 : record + 1;
        const uint32_t* next_words =
            words + next * Ends::kRecordWords + (last ? (first + Outputs) % kBlockN : first);
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; ++o) {
          next_offsets[o] = Multiply::template offsets<kRowBytes>(
              next_words + o, next * Multiply::kPanelRows * kRowBytes);
        }
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 8
          for (int o = 0; o < Outputs; ++o) {
            next_quad[o] =
                q + 1 < kQuads ? S::quad(offsets[o], q + 1) : S::quad(next_offsets[o], 0);
          }
#pragma GCC unroll 4
          for (int step = 0; step < 4; ++step) {
#pragma GCC unroll 8
            for (int o = 0; o < Outputs; ++o) {
              const F broadcast = S::broadcast(weight + (4 * q + step) * kBlockN + o);
              const char* x = S::opaque(panel + static_cast<uint16_t>(quad[o] >> (16 * step)));
#pragma GCC unroll 16
              for (int v = 0; v < Vectors; ++v) {
                sum[o][v] =
                    Multiply::multiply(broadcast, x + v * S::kLanes * sizeof(float), sum[o][v]);
              }
            }
          }
#pragma GCC unroll 8
          for (int o = 0; o < Outputs; ++o) quad[o] = next_quad[o];
        }
#pragma GCC unroll 8
        for (int o = 0; o < Outputs; ++o) offsets[o] = next_offsets[o];
      }
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) {
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) S::store(sums + (o * Vectors + v) * S::kLanes, sum[o][v]);
      }
    }
  }

  template <int Vectors>
  static void run_tile(const ManyRowsTask& task) {
    // About eight sums in flight hide the latency of a multiply-add.
    constexpr int kOutputs = Vectors >= 7 ? 1 : Vectors >= 4 ? 2 : 4;
    constexpr int64_t kTileRows = Vectors * S::kLanes;
    constexpr int64_t kPanelBytes = Multiply::kPanelRows * kTileRows * sizeof(float);
    static_assert(kPanelBytes < 1 << 16, "offsets into the panel are 16 bits");
    alignas(64) uint32_t expanded[kMaxRecordsPerPass * Multiply::kSteps * kBlockN];
    for (int64_t begin = 0; begin < task.records; begin += task.records_per_pass) {
      const int64_t left = task.records - begin;
      const int64_t records = left < task.records_per_pass ? left : task.records_per_pass;
      pack<Vectors>(task.x, begin, begin + records, task.panel);
      const auto* panel = reinterpret_cast<const char*>(task.panel);
      for (int64_t block = 0; block < task.blocks; ++block) {
        const uint32_t* words = task.panels + (block * task.records + begin) * Ends::kRecordWords;
        const uint32_t* weights = Multiply::weights(words, records, expanded);
        // Two blocks ahead: a block's first output already reads all of its weights.
        const int64_t next_block = (block + 2) % task.blocks;
        const int64_t next_begin = block + 2 < task.blocks ? begin : begin + records;
        const uint32_t* next =
            task.panels + (next_block * task.records + next_begin) * Ends::kRecordWords;
        const int64_t lines = records * Ends::kRecordLines;
        const int64_t step = task.spread_fetch ? (lines * kOutputs - 1) / kBlockN + 1 : lines;
        // This block's share of the rows of x that the next pass packs.
        const T* x = static_cast<const T*>(task.x.data) + (begin + records) * kRecordK;
        for (int64_t row = task.x.rows * block / task.blocks;
             row < task.x.rows * (block + 1) / task.blocks; ++row) {
          for (int64_t k = 0; k < records * kRecordK; k += 64 / sizeof(T)) {
            __builtin_prefetch(x + row * task.x.stride + k, 0, 2);
          }
        }
        multiply_block<Vectors, kOutputs>(words, weights, records, panel, begin == 0,
                                          task.sums + block * kBlockN * kTileRows,
                                          {next, next + lines * kBlockN, step});
      }
    }
    const int64_t padded = task.blocks * kBlockN;
    const int64_t outputs = task.epilogue.n < padded ? task.epilogue.n : padded;
    Ends::all(task.epilogue, task.sums, kTileRows, task.x.rows, outputs);
  }

  template <int Vectors>
  static void run_up_to(const ManyRowsTask& task) {
    if (task.tile == Vectors) return run_tile<Vectors>(task);
    if constexpr (Vectors > 1) run_up_to<Vectors - 1>(task);
  }
  static bool run(const ManyRowsTask& task) {
    run_up_to<max_many_vectors(S::kLanes)>(task);
    return true;
  }
};

}  // namespace gossamer::sparse24
