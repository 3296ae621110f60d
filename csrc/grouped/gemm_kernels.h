#pragma once
// dot: registers run along k, for 4 outputs and a tile of tokens at once.
//
//   x, packed   [step][token][register]     each register of weights meets every token of the tile,
//   W           4 rows, where they lie      each register of x meets all 4 outputs
//   sums        [token][output], a register of partial sums each, whose lanes are added at the end
//
// Written once over a vector vocabulary S (common/simd_*.h), the storage type T of x, W and y, and
// a Multiply that says how a step of both is read and multiplied:
//
//   kRegisters         vectors a step has; kColumns of T are in it
//   load<register>(p)  one of them
//   add(w, x, sum)     sum + w x, lane by lane
#include "common/simd_finish.h"
#include "grouped/gemm_unit.h"

namespace gossamer::grouped {
namespace {

// float32 multiply-adds, of what T converts to.
template <class S, class T>
struct MultiplyAdd {
  using F = typename S::F;
  static constexpr int kRegisters = 1, kColumns = S::kLanes;
  template <int>
  static F load(const T* p) {
    return S::load(p);
  }
  static F add(F w, F x, F sum) { return S::fma(w, x, sum); }
};

// Pairs of neighbours: even columns in one register and odd ones in the other cost an instruction
// each; in their order they would cost two.
template <class S>
struct MultiplyAdd<S, BFloat16> {
  using F = typename S::F;
  static constexpr int kRegisters = 2, kColumns = 2 * S::kLanes;
  template <int Register>
  static F load(const BFloat16* p) {
    const auto pairs = S::load_words(reinterpret_cast<const uint32_t*>(p));
    return Register == 0 ? S::low(pairs, BFloat16{}) : S::high(pairs, BFloat16{});
  }
  static F add(F w, F x, F sum) { return S::fma(w, x, sum); }
};

template <class S, class T, class Multiply>
struct Dot : Finish<S, T> {
  using Ends = Finish<S, T>;
  using F = typename S::F;
  static constexpr int kOutputs = 4;
  // Sums, weights and x fit the 32 or 16 registers, and eight sums hide the latency of adding.
  static constexpr int kMaxTile = S::kLanes == 16 ? 6 : 2;
  static constexpr int kRegisters = Multiply::kRegisters, kColumns = Multiply::kColumns;
  static constexpr int kStepFloats = kRegisters * S::kLanes;  // of a packed token
  // Columns of a pass: 4 rows of weights stay in L1 while the tokens go by. The same for any number
  // of tokens, so that a token's sums are.
  static constexpr int64_t kPass = 16 * 1024 / (kOutputs * sizeof(T));

  static void pack(const XRows& x, int tile, void* packed) {
    float* to = static_cast<float*>(packed);
    for (int64_t first = 0; first < x.rows; first += tile) {
      for (int64_t k = 0; k < x.k; k += kColumns) {
        for (int row = 0; row < tile; ++row, to += kStepFloats) {
          T padded[kColumns] = {};
          const T* from = static_cast<const T*>(x.data) + (first + row) * x.stride + k;
          if (first + row >= x.rows) {
            from = padded;
          } else if (k + kColumns > x.k) {
            __builtin_memcpy(padded, from, (x.k - k) * sizeof(T));
            from = padded;
          }
          S::store(to, Multiply::template load<0>(from));
          if constexpr (kRegisters == 2) S::store(to + S::kLanes, Multiply::template load<1>(from));
        }
      }
    }
  }

  // The weights of four outputs in one pass; those past the last output repeat it.
  struct Rows {
    const T* row[kOutputs];
    int64_t steps;  // whole ones
    bool tail;      // there is one more, padded with zeros here
    int64_t ahead;  // from a row to what is read after these four, in elements
    T padded[kOutputs][kColumns];
  };

  template <int Register, int Tokens>
  static void step(const T* const (&row)[kOutputs], int64_t k, const float* x,
                   F (&sum)[Tokens][kOutputs]) {
    F w[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) w[o] = Multiply::template load<Register>(row[o] + k);
#pragma GCC unroll 6
    for (int t = 0; t < Tokens; ++t) {
      const F columns = S::load(x + t * kStepFloats + Register * S::kLanes);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) sum[t][o] = Multiply::add(w[o], columns, sum[t][o]);
    }
  }

  // Each tile fetches its share of the four rows after these, so that they come while all tiles
  // compute: the hardware's own prefetch stops at the end of a page, and after the first tile.
  template <int Tokens>
  static void multiply(const Rows& rows, const float* x, Share fetch, bool add, float* sums) {
    F sum[Tokens][kOutputs];
#pragma GCC unroll 6
    for (auto& token : sum) {
#pragma GCC unroll 4
      for (F& s : token) s = S::zero();
    }
    const T* row[kOutputs] = {rows.row[0], rows.row[1], rows.row[2], rows.row[3]};
    for (int64_t i = 0; i < rows.steps; ++i, x += Tokens * kStepFloats) {
      if (fetch.has(i)) {
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) {
          __builtin_prefetch(row[o] + i * kColumns + rows.ahead, 0, 2);
        }
      }
      step<0, Tokens>(row, i * kColumns, x, sum);
      if constexpr (kRegisters == 2) step<1, Tokens>(row, i * kColumns, x, sum);
    }
    if (rows.tail) {
      const T* padded[kOutputs] = {rows.padded[0], rows.padded[1], rows.padded[2], rows.padded[3]};
      step<0, Tokens>(padded, 0, x, sum);
      if constexpr (kRegisters == 2) step<1, Tokens>(padded, 0, x, sum);
    }
    constexpr int kTogether = S::kLanes / kOutputs;  // tokens whose lanes are added at once
    for (int t = 0; t < Tokens; t += kTogether) {
      F lanes[S::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < S::kLanes; ++i) {
        lanes[i] = t + i / kOutputs < Tokens ? sum[t + i / kOutputs][i % kOutputs] : S::zero();
      }
      float totals[S::kLanes];
      S::store(totals, S::sum_lanes(lanes));
      for (int i = 0; i < kTogether && t + i < Tokens; ++i) {
        float* to = sums + (t + i) * kBlockN;
        for (int o = 0; o < kOutputs; ++o) {
          to[o] = add ? to[o] + totals[i * kOutputs + o] : totals[i * kOutputs + o];
        }
      }
    }
  }

  template <int Tokens>
  static void run_tile(const Task& task) {
    const auto* weights = static_cast<const T*>(task.weights);
    const int64_t tiles = (task.rows + Tokens - 1) / Tokens;
    const int64_t tile_floats = (task.k + kColumns - 1) / kColumns * Tokens * kStepFloats;
    for (int64_t first = 0; first < task.outputs; first += kBlockN) {
      const int64_t outputs = task.outputs - first < kBlockN ? task.outputs - first : kBlockN;
      for (int64_t k = 0; k < task.k; k += kPass) {
        const int64_t columns = task.k - k < kPass ? task.k - k : kPass;
        for (int64_t o = 0; o < outputs; o += kOutputs) {
          Rows rows;
          rows.steps = columns / kColumns;
          rows.ahead = kOutputs * task.k;
          const int64_t rest = columns - rows.steps * kColumns;
          rows.tail = rest > 0;
          for (int i = 0; i < kOutputs; ++i) {
            const int64_t output = o + i < outputs ? o + i : outputs - 1;
            rows.row[i] = weights + (first + output) * task.k + k;
            if (rest > 0) {
              __builtin_memset(rows.padded[i], 0, sizeof rows.padded[i]);
              __builtin_memcpy(rows.padded[i], rows.row[i] + rows.steps * kColumns,
                               rest * sizeof(T));
            }
          }
          const float* x = static_cast<const float*>(task.x) + k / kColumns * Tokens * kStepFloats;
          float* sums = task.sums + o;
          for (int64_t row = 0; row < task.rows; row += Tokens, x += tile_floats) {
            const Share fetch(row / Tokens, tiles, rows.steps);
            multiply<Tokens>(rows, x, fetch, k > 0, sums + row * kBlockN);
          }
        }
      }
      Epilogue e = task.epilogue;
      if (e.bias != nullptr) e.bias = static_cast<const T*>(e.bias) + first;
      e.out = static_cast<T*>(e.out) + first;
      e.n = outputs;
      Ends::rows_first(e, task.sums, kBlockN, task.rows);
    }
  }
  template <int Tokens>
  static void run_up_to(const Task& task) {
    if (task.tile == Tokens) return run_tile<Tokens>(task);
    if constexpr (Tokens > 1) run_up_to<Tokens - 1>(task);
  }
  static void run(const Task& task) { run_up_to<kMaxTile>(task); }

  static constexpr Unit unit = {
      .kernel = "dot",
      .why = "each weight read once meets all tokens of a tile",
      .max_tile = kMaxTile,
      .whole_tiles = false,
      .read_tokens = 8,  // measured on Emerald Rapids: 12 of float32, half as many of 16 bits
      .step_columns = kColumns,
      .column_bytes = kStepFloats * int64_t{sizeof(float)} / kColumns,
      .pack = pack,
      .run = run,
  };
};

// The unit of float32 multiply-adds; null for a dtype without kernels.
template <class S>
const Unit* multiply_add_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Dot<S, float, MultiplyAdd<S, float>>::unit;
    case DType::kBFloat16: return &Dot<S, BFloat16, MultiplyAdd<S, BFloat16>>::unit;
    case DType::kFloat16: return &Dot<S, Float16, MultiplyAdd<S, Float16>>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::grouped
