#pragma once
// The product with 8-bit and 4-bit weights, over a vector vocabulary S and a Dot that says how the
// weights of 16 outputs meet x (gemm_quantized_dots.h):
//
//   a word of weights     | W[n, k0..] | W[n+1, k0..] | ...   of 16 outputs
//   the row's columns     | x[m, ...]  | x[m, ...]    | ...   each lane picks its own by its index
//   sums                  | y[m, n]    | y[m, n+1]    | ...   of each row of the tile
//
// A word is widened once for all rows of the tile.
#include "common/simd_finish.h"
#include "sparse24/gemm_quantized_dots.h"

namespace gossamer::sparse24 {
namespace {

// The line of scales of a group of a record, in order.
class ScaleWalk {
 public:
  explicit ScaleWalk(const ScaleLines& of)
      : line_(of.lines), group_step_(of.records == 0 ? kBlockN : 0), records_(of.records) {}
  const float* at(int group) const { return line_ + group * group_step_; }
  void next_record() {
    if (group_step_ != 0) {
      line_ += kRecordGroups * kBlockN;
    } else if (++record_ == records_) {
      record_ = 0;
      line_ += kBlockN;
    }
  }

 private:
  const float* line_;
  int64_t group_step_, records_, record_ = 0;
};

// ---- the ends -----------------------------------------------------------------------------------

template <class S, class T>
void finish_as(const QuantizedEnds& e, const float* sums, int64_t sums_stride, int64_t rows,
               int64_t outputs) {
  using F = typename S::F;
  using Ends = Finish<S, T>;
  for (int64_t first = 0; first < outputs; first += S::kLanes) {
    const int64_t left = outputs - first;
    const F scale =
        e.scales == nullptr ? S::set1(1.0f) : Finish<S, float>::load_some(e.scales + first, left);
    const F bias = e.bias == nullptr ? S::zero()
                                     : Ends::load_some(static_cast<const T*>(e.bias) + first, left);
    for (int64_t row = 0; row < rows; ++row) {
      F y = S::load(sums + row * sums_stride + first);
      if (e.x_scales != nullptr) y = S::mul(y, S::set1(e.x_scales[row]));
      if (e.scales != nullptr) y = S::mul(y, scale);
      y = Ends::activate(S::add(y, bias), e.activation);
      T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
      if (left >= S::kLanes) {
        S::store(out, y);
      } else {
        T padded[S::kLanes];
        S::store(padded, y);
        __builtin_memcpy(out, padded, left * sizeof(T));
      }
    }
  }
}

template <class S>
void finish(const QuantizedEnds& e, const float* sums, int64_t sums_stride, int64_t rows,
            int64_t outputs) {
  switch (e.out_dtype) {
    case DType::kBFloat16: return finish_as<S, BFloat16>(e, sums, sums_stride, rows, outputs);
    case DType::kFloat16: return finish_as<S, Float16>(e, sums, sums_stride, rows, outputs);
    default: return finish_as<S, float>(e, sums, sums_stride, rows, outputs);
  }
}

// A block of the rows from `first` on.
template <class S>
void finish_rows(QuantizedEnds ends, int64_t first, const float* sums, int64_t rows) {
  if (ends.x_scales != nullptr) ends.x_scales += first;
  ends.out = static_cast<char*>(ends.out) + first * ends.out_stride * size_of(ends.out_dtype);
  finish<S>(ends, sums, kBlockN, rows, ends.n < kBlockN ? ends.n : kBlockN);
}

inline void to_x(const int8_t* from, const float*, int count, int8_t* to) {
  __builtin_memcpy(to, from, count);
}
inline void to_x(const E4M3* from, const float* numbers, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = numbers[from[i].bits];
}
template <class T>
void to_x(const T* from, const float*, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// ---- a tile -------------------------------------------------------------------------------------

template <class S, class Dot>
struct QuantizedRows {
  using F = typename S::F;
  using Sum = typename Dot::Sum;
  static constexpr int kRowBytes = Dot::kSteps * Dot::kStepBytes;  // of a record
  static constexpr int kRecordWords = Dot::kRecordLines * kBlockN;

  // [tiles][records * steps][row][step bytes]
  template <class T>
  static void pack_as(const XRows& x, const float* numbers, int tile, void* packed) {
    const int64_t records = (x.k + kRecordK - 1) / kRecordK;
    char* to = static_cast<char*>(packed);
    for (int64_t first = 0; first < x.rows; first += tile) {
      for (int64_t k = 0; k < records * kRecordK; k += kRecordK, to += tile * kRowBytes) {
        for (int row = 0; row < tile; ++row) {
          typename Dot::X columns[kRecordK] = {};
          const T* from = static_cast<const T*>(x.data) + (first + row) * x.stride + k;
          const int64_t left = x.k - k;
          if (first + row < x.rows) {
            to_x(from, numbers, static_cast<int>(left < kRecordK ? left : kRecordK), columns);
          }
          Dot::store(columns, tile * Dot::kStepBytes, to + row * Dot::kStepBytes);
        }
      }
    }
  }
  static void pack(const XRows& x, DType dtype, const float* numbers, int tile, void* packed) {
    if constexpr (sizeof(typename Dot::X) == 1) {
      pack_as<int8_t>(x, numbers, tile, packed);
    } else {
      switch (dtype) {
        case DType::kE4M3: return pack_as<E4M3>(x, numbers, tile, packed);
        case DType::kBFloat16: return pack_as<BFloat16>(x, numbers, tile, packed);
        case DType::kFloat16: return pack_as<Float16>(x, numbers, tile, packed);
        default: return pack_as<float>(x, numbers, tile, packed);
      }
    }
  }

  // How far ahead of the product the weights are fetched (gemm_few_rows.h).
  static constexpr int64_t kAheadBytes = 4096;

  // kFold: a line of scales serves whole records, whose sum is scaled; otherwise each weight is.
  template <int Rows, bool kFold>
  static void run_tile(const QuantizedTask& task) {
    constexpr int kChains = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
    const int64_t span = kFold ? task.scales.records : task.records;
    alignas(64) float sums[Rows][kBlockN];
    const auto* tile = static_cast<const char*>(task.x);
    for (int64_t first = 0; first < task.rows;
         first += Rows, tile += task.records * Rows * kRowBytes) {
      for (int lane = 0; lane < kBlockN; lane += S::kLanes) {
        ScaleWalk scales({task.scales.lines + lane, task.scales.records});
        const uint32_t* words = task.panels + lane;
        const char* x = tile;
        for (int64_t begin = 0; begin < task.records; begin += span) {
          const float* line = scales.at(0);
          const int64_t end = begin + span < task.records ? begin + span : task.records;
          Sum sum[Rows][kChains];
#pragma GCC unroll 16
          for (auto& row : sum) {
#pragma GCC unroll 4
            for (Sum& chain : row) chain = Sum{};
          }
          typename Dot::Shared shared{};
          for (int64_t record = begin; record < end;
               ++record, words += kRecordWords, x += Rows * kRowBytes) {
            for (int word = 0; word < kRecordWords; word += kBlockN) {
              __builtin_prefetch(words + kAheadBytes / 4 + word, 0, 3);
            }
            const auto indices = S::load_words(words);
#pragma GCC unroll 8
            for (int step = 0; step < Dot::kSteps; ++step) {
              const float* of_weights = Dot::kScaled && !kFold ? scales.at(step) : nullptr;
              const typename Dot::Weights weights(words, step, indices, of_weights, shared);
#pragma GCC unroll 16
              for (int row = 0; row < Rows; ++row) {
                Dot::add(weights, step, x + (step * Rows + row) * Dot::kStepBytes, sum[row]);
              }
            }
            if (Dot::kScaled) scales.next_record();
          }
#pragma GCC unroll 16
          for (int row = 0; row < Rows; ++row) {
            F total = Dot::total(sum[row], shared);
            if (kFold) total = S::mul(total, S::load(line));
            if (kFold && begin > 0) total = S::add(total, S::load(sums[row] + lane));
            S::store(sums[row] + lane, total);
          }
        }
      }
      const int64_t left = task.rows - first;
      finish_rows<S>(task.ends, first, sums[0], left < Rows ? left : Rows);
    }
  }

  // Tiles of 1, 2, 3, 4, 6, 8, 12 and 16 rows.
  static constexpr int next_tile(int rows) {
    return rows < 4 ? rows + 1 : rows < 8 ? rows + 2 : rows + 4;
  }
  static int tile_for(int64_t rows) {
    int tile = 1;
    while (tile < rows) tile = next_tile(tile);
    return tile;
  }
  template <int Rows>
  static void run_from(const QuantizedTask& task) {
    if (task.tile == Rows) {
      const bool fold = Dot::kScaled && task.scales.records != 0;
      return fold ? run_tile<Rows, Dot::kScaled>(task) : run_tile<Rows, false>(task);
    }
    if constexpr (Rows < Dot::kMaxRows) run_from<next_tile(Rows)>(task);
  }
  static bool run(const QuantizedTask& task) {
    run_from<1>(task);
    return true;
  }

  static void expand(const uint32_t* panels, int64_t records, const ScaleLines& lines,
                     uint32_t* out) {
    for (int lane = 0; lane < kBlockN; lane += S::kLanes) {
      ScaleWalk scales({lines.lines + lane, lines.records});
      const uint32_t* words = panels + lane;
      uint32_t* to = out + lane;
      for (int64_t record = 0; record < records; ++record, words += kRecordWords) {
        typename Dot::Shared shared{};
        const auto indices = S::load_words(words);
        S::store_words(to, indices);
        to += kBlockN;
        for (int step = 0; step < Dot::kSteps; ++step) {
          const float* of_weights = Dot::kScaled ? scales.at(step) : nullptr;
          const typename Dot::Weights weights(words, step, indices, of_weights, shared);
          for (const F& weight : weights.weight) {
            S::store_words(to, S::as_int(weight));
            to += kBlockN;
          }
        }
        if (Dot::kScaled) scales.next_record();
      }
    }
  }

  static constexpr QuantizedUnit unit() {
    QuantizedUnit made = {Dot::kMaxRows, kRowBytes, 1, 0, tile_for, pack, run, nullptr, finish<S>};
    if constexpr (sizeof(typename Dot::X) == sizeof(float)) made.expand = expand;
    return made;
  }
};

template <class S, class Dot>
constexpr QuantizedUnit kQuantizedUnit = QuantizedRows<S, Dot>::unit();

template <class S>
const QuantizedUnit* quantized_unit(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return &kQuantizedUnit<S, Dot8<S>>;
    case DType::kE4M3: return &kQuantizedUnit<S, DotE4M3<S>>;
    case DType::kUInt8: return &kQuantizedUnit<S, DotInt4<S>>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::sparse24
