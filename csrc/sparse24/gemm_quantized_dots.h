#pragma once
// How 8-bit and 4-bit weights meet x, over a vector vocabulary S: the Dots of
// gemm_quantized_kernels.h.
//
//   DotBytes  int8 x int8, exact int32 sums: by VPMADDUBSW, or by VPDPBUSD
//             (gemm_quantized_avx512_vnni.cpp)
//   DotE4M3   float8 weights widened to float32
//   DotInt4   4-bit weights widened to float32, x in floating point
//
// A Dot has:
//
//   Sum, Shared     of a row and of all rows
//   kSteps          of a record, each for kStepBytes of a packed row of x
//   kScaled         whether there are ScaleLines
//   kMaxRows        of a tile
//   store           packs a record of a row of x
//   Weights         made of the weights and indices of a step, times scales if there are any
//   add, total      adds a step to a row's sums; makes a float of them
#include "sparse24/gemm_quantized_unit.h"

namespace gossamer::sparse24 {
namespace {

constexpr int kWordColumns = 8;  // that a word of 8-bit values spans

// int8 x int8, four products of a lane at a time, of two groups. Product sums them up, for which it
// may have moved x: what an x of zeros sums up to comes off in the end. int32 wraps round, so this
// is exact where the sum itself fits.
template <class S, class Product>
struct DotBytes {
  using I = typename S::I;
  using Sum = I;
  using X = int8_t;
  struct Shared {
    I of_zeros = S::set1(0u);
  };
  static constexpr int kSteps = kRecordK / kWordColumns;
  static constexpr int kStepBytes = kWordColumns;
  static constexpr int kRecordLines = 1 + kSteps;
  static constexpr bool kScaled = false;
  static constexpr int kMaxRows = S::kLanes == 16 ? 16 : 8;

  static void store(const int8_t (&columns)[kRecordK], int64_t stride, char* to) {
    for (int step = 0; step < kSteps; ++step, to += stride) {
      for (int i = 0; i < kWordColumns; ++i) {
        to[i] = static_cast<char>(columns[kWordColumns * step + i] ^ Product::kMoved);
      }
    }
  }

  struct Weights {
    Product four;
    I control;

    Weights(const uint32_t* words, int step, I indices, const float*, Shared& shared)
        : four(S::load_words(words + (1 + step) * kBlockN)) {
      shared.of_zeros = four.added_to(shared.of_zeros, S::set1(0x01010101u * Product::kMoved));
      const I byte = step == 0   ? indices
                     : step == 1 ? S::template shift_right<8>(indices)
                     : step == 2 ? S::template shift_right<16>(indices)
                                 : S::template shift_right<24>(indices);
      // Its four fields of two bits, each at the bottom of a byte.
      const I nibbles = spread<12>(S::and_(byte, S::set1(0xffu)), 0x000f000fu);
      const I fields = spread<6>(nibbles, 0x03030303u);
      control = S::or_(fields, S::set1(0x04040000u));
    }
    template <int Shift>
    static I spread(I a, uint32_t mask) {
      return S::and_(S::or_(a, S::template shift_left<Shift>(a)), S::set1(mask));
    }
  };
  template <int Chains>
  static void add(const Weights& w, int step, const char* x, I (&sum)[Chains]) {
    I& a = sum[step % Chains];
    a = w.four.added_to(a, S::shuffle_bytes(S::broadcast8(x), w.control));
  }
  template <int Chains>
  static typename S::F total(const I (&sum)[Chains], const Shared& shared) {
    I all = sum[0];
    for (int chain = 1; chain < Chains; ++chain) all = S::add(all, sum[chain]);
    return S::to_float(S::sub(all, shared.of_zeros));
  }
};

// |w| x, or of a negative w |w| (-x - 1): unsigned times signed, and no pair of them leaves 16
// bits.
template <class S>
struct PairsOfBytes {
  using I = typename S::I;
  static constexpr uint8_t kMoved = 0;
  I magnitude, negative;

  explicit PairsOfBytes(I four)
      : magnitude(S::abs_bytes(four)), negative(S::negative_bytes(four)) {}
  I added_to(I sum, I x) const {
    const I pairs = S::dot_bytes(magnitude, S::xor_(x, negative));
    return S::add(sum, S::dot16(pairs, S::set1(0x00010001u)));
  }
};

template <class S>
using Dot8 = DotBytes<S, PairsOfBytes<S>>;

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
  static constexpr int kMaxRows = max_few_rows(S::kLanes);

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

}  // namespace
}  // namespace gossamer::sparse24
