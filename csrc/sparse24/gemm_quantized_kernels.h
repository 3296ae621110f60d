#pragma once
// The product with 8-bit and 4-bit weights, over a vector vocabulary S and a Dot that says how the
// weights of 16 outputs meet x:
//
//   Dot16     int8 x int8 as 16-bit numbers, exact int32 sums
//   DotE4M3   float8 weights widened to float32
//   DotInt4   4-bit weights widened to float32, x in floating point
//   DotVNNI   int8 x int8 by VPDPBUSD (gemm_quantized_vnni.cpp)
//
//   a word of weights     | W[n, k0..] | W[n+1, k0..] | ...   of 16 outputs
//   the row's columns     | x[m, ...]  | x[m, ...]    | ...   each lane picks its own by its index
//   sums                  | y[m, n]    | y[m, n+1]    | ...   of each row of the tile
//
// A word is widened once for all rows of the tile. A Dot has:
//
//   Sum, Shared     of a row and of all rows
//   kSteps          of a record, each for kStepBytes of a packed row of x
//   kScaled         whether there are ScaleLines
//   store           packs a record of a row of x
//   Weights         made of the weights and indices of a step, times scales if there are any
//   add, total      adds a step to a row's sums; makes a float of them
#include "common/simd_finish.h"
#include "sparse24/gemm_quantized_unit.h"

namespace gossamer::sparse24 {
namespace {

constexpr int kWordColumns = 8;  // that a word of 8-bit values spans

template <class S>
struct Dot16 {
  using I = typename S::I;
  using Sum = I;
  using X = int8_t;
  struct Shared {};
  static constexpr int kSteps = kRecordK / kWordColumns;
  static constexpr int kStepBytes = 2 * kWordColumns;
  static constexpr int kRecordLines = 1 + kSteps;
  static constexpr bool kScaled = false;

  static void store(const int8_t (&columns)[kRecordK], int64_t stride, char* to) {
    for (int step = 0; step < kSteps; ++step, to += stride) {
      int16_t wide[kWordColumns];
      for (int i = 0; i < kWordColumns; ++i) wide[i] = columns[kWordColumns * step + i];
      __builtin_memcpy(to, wide, sizeof wide);
    }
  }

  struct Weights {
    I pair[2], control[2];  // of two groups

    Weights(const uint32_t* words, int step, I indices, const float*, Shared&) {
      const I four = S::load_words(words + (1 + step) * kBlockN);
      // Bytes 0 and 1, and bytes 2 and 3, each as the upper half of a 16-bit number.
      const I low = S::or_(S::template shift_left<8>(S::and_(four, S::set1(0xffu))),
                           S::template shift_left<16>(S::and_(four, S::set1(0xff00u))));
      const I high = S::or_(S::template shift_right<8>(S::and_(four, S::set1(0xff0000u))),
                            S::and_(four, S::set1(0xff000000u)));
      pair[0] = S::template shift_right_signed16<8>(low);
      pair[1] = S::template shift_right_signed16<8>(high);
      const I byte = step == 0   ? indices
                     : step == 1 ? S::template shift_right<8>(indices)
                     : step == 2 ? S::template shift_right<16>(indices)
                                 : S::template shift_right<24>(indices);
      control[0] = pick(byte, 0);
      control[1] = pick(S::template shift_right<4>(byte), kWordColumns);
    }
    // The bytes of two 16-bit columns of a group, whose nibble is at the bottom.
    static I pick(I nibble, uint32_t first) {
      const I four = S::and_(nibble, S::set1(0xfu));
      const I columns = S::and_(S::or_(four, S::template shift_left<14>(four)), S::set1(0x30003u));
      return S::add(S::multiply16(columns, S::set1(0x02020202u)),
                    S::set1(0x01000100u + first * 0x01010101u));
    }
  };
  template <int Chains>
  static void add(const Weights& w, int step, const char* x, I (&sum)[Chains]) {
    const I columns = S::broadcast16(x);
    I& a = sum[step % Chains];
    a = S::add(a, S::dot16(S::shuffle_bytes(columns, w.control[0]), w.pair[0]));
    a = S::add(a, S::dot16(S::shuffle_bytes(columns, w.control[1]), w.pair[1]));
  }
  template <int Chains>
  static typename S::F total(const I (&sum)[Chains], const Shared&) {
    I all = sum[0];
    for (int chain = 1; chain < Chains; ++chain) all = S::add(all, sum[chain]);
    return S::to_float(all);
  }
};

// What the Dots with float32 sums share; a step is a group of four columns. Widen makes two floats
// of the pair of each output.
template <class S, class Widen>
struct DotFloat {
  using F = typename S::F;
  using I = typename S::I;
  using Sum = F;
  using X = float;
  struct Shared {};
  static constexpr int kSteps = kRecordGroups;
  static constexpr int kStepBytes = 4 * sizeof(float);
  static constexpr int kRecordLines = 1 + Widen::kWords;
  static constexpr bool kScaled = Widen::kScaled;

  static void store(const float (&columns)[kRecordK], int64_t stride, char* to) {
    for (int step = 0; step < kSteps; ++step, to += stride) {
      __builtin_memcpy(to, columns + 4 * step, kStepBytes);
    }
  }

  struct Weights {
    F weight[2];
    I column[2];

    Weights(const uint32_t* words, int step, I indices, const float* scales, Shared&) {
      Widen::pair(words, step, scales, weight);
      // The nibble of the group at the bottom, of which a pick reads two bits.
      switch (step) {
        case 0: column[0] = indices; break;
        case 1: column[0] = S::template shift_right<4>(indices); break;
        case 2: column[0] = S::template shift_right<8>(indices); break;
        case 3: column[0] = S::template shift_right<12>(indices); break;
        case 4: column[0] = S::template shift_right<16>(indices); break;
        case 5: column[0] = S::template shift_right<20>(indices); break;
        case 6: column[0] = S::template shift_right<24>(indices); break;
        default: column[0] = S::template shift_right<28>(indices); break;
      }
      column[1] = S::template shift_right<2>(column[0]);
    }
  };
  template <int Chains>
  static void add(const Weights& w, int step, const char* x, F (&sum)[Chains]) {
    const F columns = S::broadcast4(reinterpret_cast<const float*>(x));
#pragma GCC unroll 2
    for (int slot = 0; slot < 2; ++slot) {
      F& a = sum[(2 * step + slot) % Chains];
      a = S::fma(w.weight[slot], S::pick(columns, w.column[slot]), a);
    }
  }
  template <int Chains>
  static F total(const F (&sum)[Chains], const Shared&) {
    F all = sum[0];
    for (int chain = 1; chain < Chains; ++chain) all = S::add(all, sum[chain]);
    return all;
  }
};

// float8_e4m3fn is a float16 but for three bits of mantissa and eight in the exponent (kE4M3Scale);
// its NaN, all ones, would be a number there.
template <class S>
struct WidenE4M3 {
  using I = typename S::I;
  static constexpr int kWords = 4;
  static constexpr bool kScaled = false;
  static void pair(const uint32_t* words, int group, const float*, typename S::F (&out)[2]) {
    const I word = S::load_words(words + (1 + group / 2) * kBlockN);
    const I bytes =
        group % 2 == 0 ? S::and_(word, S::set1(0xffffu)) : S::template shift_right<16>(word);
    const I both = S::or_(bytes, S::template shift_left<8>(bytes));
    const I magnitude = S::and_(both, S::set1(0x007f007fu));
    const I nan = S::and_(S::add(magnitude, S::set1(0x00010001u)), S::set1(0x00800080u));
    const I sign = S::template shift_left<8>(S::and_(both, S::set1(0x00800080u)));
    const I halves = S::or_(sign, S::template shift_left<7>(S::or_(magnitude, nan)));
    out[0] = S::low(halves, Float16{});
    out[1] = S::high(halves, Float16{});
  }
};

template <class S>
struct WidenInt4 {
  using I = typename S::I;
  static constexpr int kWords = 2;
  static constexpr bool kScaled = true;
  static void pair(const uint32_t* words, int group, const float* scales, typename S::F (&out)[2]) {
    const I word = S::load_words(words + (1 + group / 4) * kBlockN);
    switch (group % 4) {
      case 0: out[0] = S::template four_bit<0>(word), out[1] = S::template four_bit<1>(word); break;
      case 1: out[0] = S::template four_bit<2>(word), out[1] = S::template four_bit<3>(word); break;
      case 2: out[0] = S::template four_bit<4>(word), out[1] = S::template four_bit<5>(word); break;
      default: out[0] = S::template four_bit<6>(word), out[1] = S::template four_bit<7>(word);
    }
    if (scales != nullptr) {
      for (auto& weight : out) weight = S::mul(weight, S::load(scales));
    }
  }
};

template <class S>
using DotE4M3 = DotFloat<S, WidenE4M3<S>>;
template <class S>
using DotInt4 = DotFloat<S, WidenInt4<S>>;

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
  static constexpr int kMaxRows = max_few_rows(S::kLanes);
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
    if constexpr (Rows < kMaxRows) run_from<next_tile(Rows)>(task);
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
    QuantizedUnit made = {kMaxRows, kRowBytes, 1, 0, tile_for, pack, run, nullptr, finish<S>};
    if constexpr (sizeof(typename Dot::X) == sizeof(float)) made.expand = expand;
    return made;
  }
};

template <class S, class Dot>
constexpr QuantizedUnit kQuantizedUnit = QuantizedRows<S, Dot>::unit();

template <class S>
const QuantizedUnit* quantized_unit(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return &kQuantizedUnit<S, Dot16<S>>;
    case DType::kE4M3: return &kQuantizedUnit<S, DotE4M3<S>>;
    case DType::kUInt8: return &kQuantizedUnit<S, DotInt4<S>>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::sparse24
