#pragma once
// few_rows: y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]), 16 outputs of a row at a time.
//
//   a slot of a group     | W[n, k0] | W[n+1, k1] | ...   of 16 outputs
//   the row's columns     | x[m, k0] | x[m, k1]   | ...   each lane picks its own by its index
//   sums                  | y[m, n]  | y[m, n+1]  | ...   of each row of the tile
//
// A record of weights is read once for all rows of the tile, front to back.
#include "sparse24/gemm_ends.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct FewRows {
  using Ends = GemmEnds<S, T, Multiply>;
  using F = typename Ends::F;
  using X = typename Ends::X;
  static constexpr int kRegs = kBlockN / S::kLanes;  // registers of 16 outputs

  static void pack(const XRows& x, int tile, void* packed) {
    const int64_t records = (x.k + kRecordK - 1) / kRecordK;
    X* out = static_cast<X*>(packed);
    for (int64_t first = 0; first < x.rows; first += tile, out += records * kRecordK * tile) {
      for (int64_t record = 0; record < records; ++record) {
        for (int row = 0; row < tile; ++row) {
          X columns[kRecordK];
          Ends::fetch(x, first + row, record * kRecordK, columns);
          X* groups = out + record * kRecordK * tile + 4 * row;
          for (int k = 0; k < kRecordK; k += 4) {
            __builtin_memcpy(groups + k * tile, columns + k, 4 * sizeof(X));
          }
        }
      }
    }
  }

  static void finish_row(const F (&sum)[kRegs], const float* bias, const Epilogue& e, int64_t row,
                         int64_t first) {
    T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
    T padded[kBlockN];
    T* to = e.n - first < kBlockN ? padded : out;
    for (int r = 0; r < kRegs; ++r) {
      S::store(to + r * S::kLanes,
               Ends::activate(S::add(sum[r], S::load(bias + r * S::kLanes)), e.activation));
    }
    if (to == padded) {
      for (int64_t i = 0; i < e.n - first; ++i) out[i] = padded[i];
    }
  }

  // Independent chains of multiply-adds a row needs so that, with the tile's other rows and
  // registers, about eight are in flight: what hides the latency of one.
  static constexpr int chains(int rows) {
    const int wanted = 8 / (rows * kRegs);
    return wanted >= 8 ? 8 : wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
  }

  // How far ahead of the multiply the weights are fetched: past the end of the 4 KiB page, where
  // the hardware's own prefetch stops. On Zen 5 one and two rows, bound by memory alone, gain
  // nothing; on Emerald Rapids they gain 5 to 9 % from the L3 and 20 % from memory.
  static constexpr int64_t kAheadBytes = 4096;

  template <int Rows>
  static void run_tile(const FewRowsTask& task) {
    constexpr int kChains = chains(Rows);
    const int64_t tile_elements = task.records * kRecordK * Rows;
    for (int64_t block = 0; block < task.blocks; ++block) {
      const uint32_t* panels = task.panels + block * task.records * Ends::kRecordWords;
      float bias[kBlockN];
      Ends::load_bias(task.epilogue, block * kBlockN, bias);
      const X* x = static_cast<const X*>(task.x);
      for (int64_t first = 0; first < task.rows; first += Rows, x += tile_elements) {
        F sum[Rows][kRegs][kChains];
#pragma GCC unroll 16
        for (auto& row : sum) {
#pragma GCC unroll 2
          for (auto& reg : row) {
#pragma GCC unroll 8
            for (F& chain : reg) chain = S::zero();
          }
        }
        const X* columns = x;
        for (int64_t record = 0; record < task.records; ++record, columns += kRecordK * Rows) {
          const uint32_t* words = panels + record * Ends::kRecordWords;
          for (int word = 0; word < Ends::kRecordWords; word += kBlockN) {
            __builtin_prefetch(words + kAheadBytes / 4 + word, 0, 3);
          }
          typename S::I indices[kRegs];
#pragma GCC unroll 2
          for (int r = 0; r < kRegs; ++r) indices[r] = S::load_words(words + r * S::kLanes);
#pragma GCC unroll 8
          for (int g = 0; g < kRecordGroups; ++g) {
            Multiply::template multiply_group<Rows, kRegs, kChains>(words, g, indices,
                                                                    columns + 4 * g * Rows, sum);
#pragma GCC unroll 2
            for (auto& nibbles : indices) nibbles = S::template shift_right<4>(nibbles);
          }
        }
        for (int row = 0; row < Rows && first + row < task.rows; ++row) {
          F total[kRegs];
          for (int r = 0; r < kRegs; ++r) {
            total[r] = sum[row][r][0];
            for (int chain = 1; chain < kChains; ++chain)
              total[r] = S::add(total[r], sum[row][r][chain]);
          }
          finish_row(total, bias, task.epilogue, first + row, block * kBlockN);
        }
      }
    }
  }
  template <int Rows>
  static void run_up_to(const FewRowsTask& task) {
    if (task.tile == Rows) return run_tile<Rows>(task);
    if constexpr (Rows > 1) run_up_to<Rows - 1>(task);
  }
  static void run(const FewRowsTask& task) { run_up_to<max_few_rows(S::kLanes)>(task); }
};

}  // namespace gossamer::sparse24
