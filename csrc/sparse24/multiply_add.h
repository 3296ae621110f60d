#pragma once
// The Multiply of float32 (gemm_kernels.h says what one has to offer): multiply-adds over a vector
// vocabulary S, with storage of type T converted on the way in.
#include "sparse24/gemm_unit.h"

namespace gossamer::sparse24 {

template <class S, class T>
struct MultiplyAdd {
  using F = typename S::F;
  using I = typename S::I;
  using X = float;
  static constexpr int kSteps = 2 * kRecordGroups;
  static constexpr int kPanelRows = kRecordK;

  // few_rows, group g: the kept pairs of 16 outputs against `Rows` rows of x. The group's nibble is
  // at the bottom of `indices`, of which a lane's pick reads two bits; x points to each row's four
  // columns of the group.
  template <int Rows, int Regs, int Chains>
  static void multiply_group(const uint32_t* block, int g, const I (&indices)[Regs], const X* x,
                             F (&sum)[Rows][Regs][Chains]) {
    F weight[2][Regs];
    I column[2][Regs];
#pragma GCC unroll 2
    for (int r = 0; r < Regs; ++r) {
      load_pair(block, g, r, weight[0][r], weight[1][r], T{});
      column[0][r] = indices[r];
      column[1][r] = S::template shift_right<2>(indices[r]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const F columns = S::broadcast4(x + 4 * row);
#pragma GCC unroll 2
      for (int slot = 0; slot < 2; ++slot) {
#pragma GCC unroll 2
        for (int r = 0; r < Regs; ++r) {
          F& a = sum[row][r][(2 * g + slot) % Chains];
          a = S::fma(weight[slot][r], S::pick(columns, column[slot][r]), a);
        }
      }
    }
  }

  // many_rows: the kept weights as floats, a record kWeightWords after the other (in place where
  // they are), and, from the index word of one output, the byte offset of the row of the panel that
  // each of its weights meets.
  static constexpr bool kInPlace = sizeof(T) == sizeof(float);
  static constexpr int kWeightWords = (kInPlace ? 1 + kSteps : kSteps) * kBlockN;
  static const uint32_t* weights(const uint32_t* records, int64_t count, uint32_t* scratch) {
    if constexpr (kInPlace) return records + kBlockN;
    for (int64_t i = 0; i < count; ++i) {
      expand(records + i * (1 + kRecordGroups) * kBlockN, scratch + i * kWeightWords, T{});
    }
    return scratch;
  }
  template <int RowBytes>
  static typename S::H offsets(const uint32_t* indices, int64_t base) {
    const typename S::H column = S::add16(S::bit_pairs(*indices), S::group_columns());
    return S::add16(S::mul16(column, S::set16(RowBytes)), S::set16(base));
  }
  static F multiply(F weight, const char* x, F sum) {
    return S::fma(weight, S::load(reinterpret_cast<const float*>(x)), sum);
  }

  // A record of S::kLanes rows of x: its columns become rows of the panel.
  static void pack_record(const float* rows, int64_t stride, int64_t panel_stride,
                          uint32_t* panel) {
    for (int k = 0; k < kRecordK; k += S::kLanes) {
      I words[S::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < S::kLanes; ++i) words[i] = S::as_int(S::load(rows + i * stride + k));
      S::transpose(words, panel + k * panel_stride, 4 * panel_stride);
    }
  }

 private:
  static void load_pair(const uint32_t* block, int g, int r, F& first, F& second, float) {
    const auto* words =
        reinterpret_cast<const float*>(block + (1 + 2 * g) * kBlockN + r * S::kLanes);
    first = S::load(words);
    second = S::load(words + kBlockN);
  }
  template <class Half>
  static void load_pair(const uint32_t* block, int g, int r, F& first, F& second, Half) {
    const I pair = S::load_words(block + (1 + g) * kBlockN + r * S::kLanes);
    first = S::low(pair, Half{});
    second = S::high(pair, Half{});
  }
  static void expand(const uint32_t*, uint32_t*, float) {}
  template <class Half>
  static void expand(const uint32_t* record, uint32_t* scratch, Half) {
    for (int g = 0; g < kRecordGroups; ++g) {
      for (int lane = 0; lane < kBlockN; lane += S::kLanes) {
        const I pair = S::load_words(record + (1 + g) * kBlockN + lane);
        S::store_words(scratch + 2 * g * kBlockN + lane, S::as_int(S::low(pair, Half{})));
        S::store_words(scratch + (2 * g + 1) * kBlockN + lane, S::as_int(S::high(pair, Half{})));
      }
    }
  }
};

}  // namespace gossamer::sparse24
