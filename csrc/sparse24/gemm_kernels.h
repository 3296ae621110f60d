#pragma once
// The 2:4 kernels, written once over a vector vocabulary S (common/simd_*.h), the storage type T of
// x, W and y, and a Multiply that says how a kept weight meets x:
//
//   MultiplyAdd  float32 multiply-add, T converted on the way in (multiply_add.h)
//   DotBF16      a kept pair at a time, by VDPBF16PS (gemm_avx512_bf16.cpp)
//
// Per Multiply:  X            element of a packed few_rows x
//                kSteps       broadcast weights a record holds per output (many_rows)
//                kPanelRows   packed rows of x a record of many_rows reads
//                kChunk       columns of a row of x that lie together in a packed few_rows x
#include "common/simd_math.h"
#include "sparse24/gemm_unit.h"
#include "sparse24/multiply_add.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct Kernels {
  using F = typename S::F;
  using X = typename Multiply::X;
  static constexpr int kRegs = kBlockN / S::kLanes;  // registers of 16 outputs
  static constexpr int kRecordLines = 1 + kRecordGroups * (sizeof(T) == 4 ? 2 : 1);  // of 64 bytes
  static constexpr int kRecordWords = kRecordLines * kBlockN;

  // ---- y = act(sum + bias), 16 outputs of a row ------------------------------------------------

  // Of the `count` outputs from `first` on; those past n get 0.
  template <int kCount>
  static void load_bias(const Epilogue& e, int64_t first, float (&bias)[kCount]) {
    T padded[kCount] = {};
    const T* from = padded;
    if (e.bias != nullptr) {
      from = static_cast<const T*>(e.bias) + first;
      if (e.n - first < kCount) {
        __builtin_memcpy(padded, from, (e.n - first) * sizeof(T));
        from = padded;
      }
    }
    for (int i = 0; i < kCount; i += S::kLanes) S::store(bias + i, S::load(from + i));
  }

  static F activate(F y, Activation activation) {
    switch (activation) {
      case Activation::kNone: break;
      case Activation::kReLU: return S::where_negative(y, S::zero(), y);
      case Activation::kGELU: return gelu<S>(y);
      case Activation::kSiLU: return silu<S>(y);
    }
    return y;
  }

  static void finish_row(const F (&sum)[kRegs], const float* bias, const Epilogue& e, int64_t row,
                         int64_t first) {
    T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
    T padded[kBlockN];
    T* to = e.n - first < kBlockN ? padded : out;
    for (int r = 0; r < kRegs; ++r) {
      S::store(to + r * S::kLanes,
               activate(S::add(sum[r], S::load(bias + r * S::kLanes)), e.activation));
    }
    if (to == padded) {
      for (int64_t i = 0; i < e.n - first; ++i) out[i] = padded[i];
    }
  }

  // ---- x, a record of a row at a time -----------------------------------------------------------

  static void fetch(const XRows& x, int64_t row, int64_t k, X (&columns)[kRecordK]) {
    const T* from = static_cast<const T*>(x.data) + row * x.stride + k;
    if (row < x.rows && k + kRecordK <= x.k) return convert(from, columns);
    T padded[kRecordK] = {};
    for (int64_t i = 0; row < x.rows && i < kRecordK && k + i < x.k; ++i) padded[i] = from[i];
    convert(padded, columns);
  }
  static void convert(const T* from, X (&columns)[kRecordK]) {
    if constexpr (sizeof(X) == sizeof(T)) {
      __builtin_memcpy(columns, from, sizeof columns);
    } else {
      for (int i = 0; i < kRecordK; i += S::kLanes) S::store(columns + i, S::load(from + i));
    }
  }

  // ---- few_rows ---------------------------------------------------------------------------------

  static void pack_few(const XRows& x, int tile, void* packed) {
    const int64_t records = (x.k + kRecordK - 1) / kRecordK;
    X* out = static_cast<X*>(packed);
    for (int64_t first = 0; first < x.rows; first += tile, out += records * kRecordK * tile) {
      for (int row = 0; row < tile; ++row) {
        for (int64_t record = 0; record < records; ++record) {
          X columns[kRecordK];
          fetch(x, first + row, record * kRecordK, columns);
          X* chunks = out + record * kRecordK * tile + row * Multiply::kChunk;
          for (int k = 0; k < kRecordK; k += Multiply::kChunk) {
            __builtin_memcpy(chunks + k * tile, columns + k, Multiply::kChunk * sizeof(X));
          }
        }
      }
    }
  }

  // Independent chains of multiply-adds a row needs so that, with the tile's other rows and
  // registers, about eight are in flight: what hides the latency of one.
  static constexpr int chains(int rows) {
    const int wanted = 8 / (rows * kRegs);
    return wanted >= 8 ? 8 : wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
  }

  // How far ahead of the multiply the weights are fetched: past the end of the 4 KiB page, where
  // the hardware's own prefetch stops. One or two rows are bound by memory alone and gain nothing.
  static constexpr int64_t kAheadBytes = 4096;

  template <int Rows>
  static void few_rows_tile(const FewRowsTask& task) {
    constexpr int kChains = chains(Rows);
    const int64_t tile_elements = task.records * kRecordK * Rows;
    for (int64_t block = 0; block < task.blocks; ++block) {
      const uint32_t* panels = task.panels + block * task.records * kRecordWords;
      float bias[kBlockN];
      load_bias(task.epilogue, block * kBlockN, bias);
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
          const uint32_t* words = panels + record * kRecordWords;
          for (int word = 0; Rows > 2 && word < kRecordWords; word += kBlockN) {
            __builtin_prefetch(words + kAheadBytes / 4 + word, 0, 3);
          }
          typename S::I indices[kRegs];
#pragma GCC unroll 2
          for (int r = 0; r < kRegs; ++r) indices[r] = S::load_words(words + r * S::kLanes);
#pragma GCC unroll 8
          for (int g = 0; g < kRecordGroups; ++g) {
            Multiply::template multiply_group<Rows, kRegs, kChains>(
                words, g, indices, columns + 4 * g / Multiply::kChunk * Multiply::kChunk * Rows,
                sum);
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
  static void few_rows_up_to(const FewRowsTask& task) {
    if (task.tile == Rows) return few_rows_tile<Rows>(task);
    if constexpr (Rows > 1) few_rows_up_to<Rows - 1>(task);
  }
  static void few_rows(const FewRowsTask& task) { few_rows_up_to<max_few_rows(S::kLanes)>(task); }

  // ---- many_rows --------------------------------------------------------------------------------

  template <int Vectors>
  static void pack_many(const XRows& x, int64_t begin, int64_t end, uint32_t* packed) {
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
        for (int i = 0; i < S::kLanes; ++i) fetch(x, row + i, k, rows[i]);
        Multiply::pack_record(rows[0], kRecordK, stride, panel);
      }
    }
  }

  // One pass: 16 outputs of a block against all rows of the tile, over `records` records of K.
  //
  // A multiply-add reads x from memory, so the loads are the limit: (Vectors + 1) of them for
  // Vectors multiply-adds. Their addresses must never be late, and must not come through integer
  // loads, which take the same ports: the offsets of an output's next record are computed in vector
  // registers while this one is multiplied, and move to integer registers four at a time, four
  // steps ahead.
  template <int Vectors, int Outputs>
  static void multiply_block(const uint32_t* words, const uint32_t* weights, int64_t records,
                             const char* panel, bool first_pass, float* sums) {
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
            words + next * kRecordWords + (last ? (first + Outputs) % kBlockN : first);
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
              const char* x = panel + static_cast<uint16_t>(quad[o] >> (16 * step));
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
  static void many_rows_tile(const ManyRowsTask& task) {
    // About eight sums in flight hide the latency of a multiply-add.
    constexpr int kOutputs = Vectors >= 7 ? 1 : Vectors >= 4 ? 2 : 4;
    constexpr int64_t kTileRows = Vectors * S::kLanes;
    constexpr int64_t kPanelBytes = Multiply::kPanelRows * kTileRows * sizeof(float);
    static_assert(kPanelBytes < 1 << 16, "offsets into the panel are 16 bits");
    alignas(64) uint32_t expanded[kMaxRecordsPerPass * Multiply::kSteps * kBlockN];
    for (int64_t begin = 0; begin < task.records; begin += task.records_per_pass) {
      const int64_t left = task.records - begin;
      const int64_t records = left < task.records_per_pass ? left : task.records_per_pass;
      pack_many<Vectors>(task.x, begin, begin + records, task.panel);
      const auto* panel = reinterpret_cast<const char*>(task.panel);
      for (int64_t block = 0; block < task.blocks; ++block) {
        const uint32_t* words = task.panels + (block * task.records + begin) * kRecordWords;
        const uint32_t* weights = Multiply::weights(words, records, expanded);
        // Two blocks ahead: a block's first output already reads all of its weights.
        const int64_t next_block = (block + 2) % task.blocks;
        const int64_t next_begin = block + 2 < task.blocks ? begin : begin + records;
        const uint32_t* next =
            task.panels + (next_block * task.records + next_begin) * kRecordWords;
        for (int64_t word = 0; word < records * kRecordWords; word += kBlockN) {
          __builtin_prefetch(next + word, 0, 3);
        }
        // This block's share of the rows of x that the next pass packs.
        const T* x = static_cast<const T*>(task.x.data) + (begin + records) * kRecordK;
        for (int64_t row = task.x.rows * block / task.blocks;
             row < task.x.rows * (block + 1) / task.blocks; ++row) {
          for (int64_t k = 0; k < records * kRecordK; k += 64 / sizeof(T)) {
            __builtin_prefetch(x + row * task.x.stride + k, 0, 2);
          }
        }
        multiply_block<Vectors, kOutputs>(words, weights, records, panel, begin == 0,
                                          task.sums + block * kBlockN * kTileRows);
      }
    }
    // Rows outside, so that neighbouring outputs of a row are written soon after each other.
    const int64_t padded = task.blocks * kBlockN;
    const int64_t outputs = task.epilogue.n < padded ? task.epilogue.n : padded;
    for (int64_t row = 0; row < task.x.rows; row += S::kLanes) {
      for (int64_t first = 0; first < outputs; first += kSquare) {
        finish_square<kTileRows>(task, row, first, outputs - first);
      }
    }
  }

  // The sums lie output by output, y row by row: a square of kLanes rows by as many words of y is
  // finished, rounded and then transposed. Where the task's outputs end inside the square, the sums
  // past them are whatever the memory holds, and are not written.
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr int kSquare = S::kLanes * kPerWord;  // outputs

  template <int64_t kTileRows>
  static void finish_square(const ManyRowsTask& task, int64_t row, int64_t first, int64_t outputs) {
    const Epilogue& e = task.epilogue;
    const float* sums = task.sums + first * kTileRows + row;
    float bias[kSquare];
    load_bias(e, first, bias);
    const auto finished = [&](int output) {
      const F sum = S::load(sums + output * kTileRows);
      return activate(S::add(sum, S::set1(bias[output])), e.activation);
    };
    typename S::I words[S::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      if constexpr (kPerWord == 1) {
        words[i] = S::as_int(finished(i));
      } else {
        words[i] = S::pair(finished(2 * i), finished(2 * i + 1), T{});
      }
    }
    T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
    const int64_t rows = task.x.rows - row;
    if (outputs >= kSquare && rows >= S::kLanes) {
      return S::transpose(words, out, e.out_stride * sizeof(T));
    }
    alignas(64) T square[S::kLanes][kSquare];
    S::transpose(words, square, sizeof square[0]);
    for (int64_t i = 0; i < rows && i < S::kLanes; ++i) {
      __builtin_memcpy(out + i * e.out_stride, square[i],
                       (outputs < kSquare ? outputs : kSquare) * sizeof(T));
    }
  }

  template <int Vectors>
  static void many_rows_up_to(const ManyRowsTask& task) {
    if (task.tile == Vectors) return many_rows_tile<Vectors>(task);
    if constexpr (Vectors > 1) many_rows_up_to<Vectors - 1>(task);
  }
  static void many_rows(const ManyRowsTask& task) {
    many_rows_up_to<max_many_vectors(S::kLanes)>(task);
  }

  static constexpr Unit unit = {sizeof(X), Multiply::kPanelRows, pack_few, few_rows, many_rows};
};

// The unit of float32 multiply-adds; null for a dtype without kernels.
template <class S>
const Unit* multiply_add_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Kernels<S, float, MultiplyAdd<S, float>>::unit;
    case DType::kBFloat16: return &Kernels<S, BFloat16, MultiplyAdd<S, BFloat16>>::unit;
    case DType::kFloat16: return &Kernels<S, Float16, MultiplyAdd<S, Float16>>::unit;
    default: return nullptr;
  }
}

}  // namespace gossamer::sparse24
