#pragma once
// Where the sums of the AMX kernel go: the pixels of a group, the epilogue, and what of y is
// fetched for it. Included by conv_amx.cpp.
#include "blocksparse/conv_tiles.h"
#include "common/simd_avx512.h"
#include "common/simd_finish.h"

namespace gossamer::blocksparse {
namespace {

using F = Simd::F;
using I = Simd::I;

constexpr int64_t kGroupPixels = kMostTiles * kTile;
constexpr int kTileFloats = kTile * kTile;
constexpr int kLine = 64;  // bytes

// The pixels of a group that are outputs, and where y has them.
struct Pixels {
  static constexpr int kAtOnce = 4;
  int64_t count = 0;
  // Written in whole registers; past the end the last one is repeated.
  alignas(64) int32_t at[kGroupPixels + kTile];  // in the group's sums
  alignas(64) int64_t y[kGroupPixels + kTile];

  void find(const TileTask& task, int64_t begin, int64_t end) {
    const SlabPanel& panel = *task.panel;
    const int64_t line = begin / panel.pitch;
    int64_t column = begin - line * panel.pitch, row = line / panel.images;
    int64_t image = line - row * panel.images;
    count = 0;
    int32_t last_at = 0;
    int64_t last_y = 0;
    for (int64_t q = begin; q < end;) {
      const int64_t in_strip = task.strip.width - column, in_group = end - q;
      const int64_t length = in_strip < in_group ? in_strip : in_group;
      if (length > 0) {
        const int64_t first =
            image * task.image_stride + row * task.row_stride + column * task.pixel_stride;
        last_at = static_cast<int32_t>(kTile * (q - begin + length - 1));
        last_y = first + (length - 1) * task.pixel_stride;
        add(static_cast<int32_t>(kTile * (q - begin)), length, first, task.pixel_stride);
      }
      q += panel.pitch - column;
      column = 0;
      if (++image == panel.images) image = 0, ++row;
    }
    // Not read back: that would wait for the registers on their way to memory.
    for (int i = 0; i < kAtOnce; ++i) at[count + i] = last_at, y[count + i] = last_y;
  }

 private:
  void add(int32_t first, int64_t length, int64_t first_y, int64_t stride) {
    static_assert(kTile == 16);
    const I ones = Simd::shift_left<4>(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const I low = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const I strides = _mm512_mullo_epi64(low, _mm512_set1_epi64(stride));
    for (int64_t i = 0; i < length; i += kTile) {
      const I from = Simd::set1(static_cast<uint32_t>(first + kTile * i));
      _mm512_storeu_si512(at + count + i, Simd::add(from, ones));
      for (int half = 0; half < kTile; half += 8) {
        const I begin = _mm512_set1_epi64(first_y + (i + half) * stride);
        _mm512_storeu_si512(y + count + i + half, _mm512_add_epi64(begin, strides));
      }
    }
    count += length;
  }
};

// Sums on their way out, of one or two tiles of outputs.
struct Outgoing {
  static constexpr int kOutputs = 2 * kTile;
  alignas(64) float sums[2][kMostTiles * kTileFloats];
  alignas(64) float bias[kOutputs];
  Epilogue e;
  const Pixels* pixels = nullptr;
  int tiles = 1, parts = 1;
  bool channels_last;
  int64_t channel_stride, outputs;
  int64_t done = 0, count = 0;
  __mmask16 ordered = 0xffff;  // lanes without a NaN so far

  int64_t left() const { return count - done; }
  // Whole lots of kAtOnce: with few branches, since one that is guessed wrong stops the products.
  void some(int64_t lots) {
    if (done >= count) return;
    if (!channels_last) return some_squares(done + lots * Pixels::kAtOnce);
    switch (e.activation) {
      case Activation::kNone: return write<Activation::kNone>(lots);
      case Activation::kReLU: return write<Activation::kReLU>(lots);
      case Activation::kGELU: return write<Activation::kGELU>(lots);
      case Activation::kSiLU: return write<Activation::kSiLU>(lots);
    }
  }
  void rest() { some((left() + Pixels::kAtOnce - 1) / Pixels::kAtOnce); }

 private:
  template <Activation A>
  void write(int64_t lots) {
    const int64_t most = (left() + Pixels::kAtOnce - 1) / Pixels::kAtOnce;
    if (lots > most) lots = most;
    if (parts > 1) return write_pixels<A, kMostTiles, false>(lots);
    if (outputs < kOutputs) return write_pixels<A, 1, false>(lots);
    write_pixels<A, 1, true>(lots);
  }

  template <int Parts>
  static F load_sum(const float* sums) {
    F sum = Simd::load(sums);
    for (int part = 1; part < Parts; ++part) {
      sum = Simd::add(sum, Simd::load(sums + part * kTileFloats));
    }
    return sum;
  }

  const uint16_t* residual_of(const uint16_t* out) const {
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<intptr_t>(out) + e.residual);
  }
  // That of some outputs of a pixel, which lie channel_stride apart.
  F residual_at(const uint16_t* out, int64_t count) const {
    alignas(32) uint16_t halves[kTile] = {};
    for (int64_t o = 0; o < count; ++o) halves[o] = *residual_of(out + o * channel_stride);
    return widened(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves)));
  }
  static F widened(__m256i halves) { return Simd::low(_mm512_cvtepu16_epi32(halves), BFloat16{}); }

  template <Activation A, int Parts, bool Whole>
  void write_pixels(int64_t lots) {
    const __mmask32 there = _cvtu32_mask32(outputs >= kOutputs ? ~0u : (1u << outputs) - 1);
    const F bias0 = Simd::load(bias), bias1 = Simd::load(bias + kTile);
    const float *const sums0 = sums[0], *const sums1 = sums[tiles - 1];
    auto* const out = static_cast<uint16_t*>(e.out);
    const int32_t* at = pixels->at + done;
    const int64_t* y = pixels->y + done;
    done += lots * Pixels::kAtOnce;
    __mmask16 check = ordered;
    for (; lots > 0; --lots, at += Pixels::kAtOnce, y += Pixels::kAtOnce) {
#pragma GCC unroll 4
      for (int i = 0; i < Pixels::kAtOnce; ++i) {
        F sum0 = Simd::add(load_sum<Parts>(sums0 + at[i]), bias0);
        F sum1 = Simd::add(load_sum<Parts>(sums1 + at[i]), bias1);
        check = _mm512_mask_cmp_ps_mask(check, sum0, sum1, _CMP_ORD_Q);
        if (e.residual != 0) {
          const uint16_t* from = residual_of(out + y[i]);
          const I both = _mm512_maskz_loadu_epi16(there, from);
          sum0 = Simd::add(sum0, widened(_mm512_castsi512_si256(both)));
          sum1 = Simd::add(sum1, widened(_mm512_extracti64x4_epi64(both, 1)));
        }
        // Subnormals become zero.
        const I both = (I)_mm512_cvtne2ps_pbh(Finish<Simd, BFloat16>::activate(sum1, A),
                                              Finish<Simd, BFloat16>::activate(sum0, A));
        if constexpr (Whole) {
          _mm512_storeu_si512(out + y[i], both);
        } else {
          _mm512_mask_storeu_epi16(out + y[i], there, both);
        }
      }
    }
    ordered = check;
  }

  void some_squares(int64_t due) {
    while (done < count && done < due) write_square();
  }

  // 32 pixels by 16 outputs at a time are transposed.
  void write_square() {
    constexpr int kSquare = 32;
    const int64_t size = count - done < kSquare ? count - done : kSquare;
    for (int tile = 0; tile < tiles; ++tile) {
      I words[kTile];
      const F added = Simd::load(bias + tile * kTile);
      auto* out = static_cast<uint16_t*>(e.out) + tile * kTile * channel_stride;
      const int64_t left = outputs - tile * kTile, rows = left < kTile ? left : kTile;
      for (int i = 0; i < kTile; ++i) {
        __m256i pair[2];
        for (int which = 0; which < 2; ++which) {
          const int64_t pixel = 2 * i + which < size ? done + 2 * i + which : done;
          const float* from = sums[tile] + pixels->at[pixel];
          F sum = parts == 1 ? load_sum<1>(from) : load_sum<kMostTiles>(from);
          ordered = _mm512_mask_cmp_ps_mask(ordered, sum, sum, _CMP_ORD_Q);
          sum = Simd::add(sum, added);
          if (e.residual != 0) sum = Simd::add(sum, residual_at(out + pixels->y[pixel], rows));
          const F y = Finish<Simd, BFloat16>::activate(sum, e.activation);
          pair[which] = (__m256i)_mm512_cvtneps_pbh(y);
        }
        words[i] = Simd::or_(_mm512_cvtepu16_epi32(pair[0]),
                             Simd::shift_left<16>(_mm512_cvtepu16_epi32(pair[1])));
      }
      alignas(64) uint16_t square[kTile][kSquare];
      Simd::transpose(words, square, sizeof square[0]);
      for (int64_t begin = 0, end; begin < size; begin = end) {  // what follows each other in y
        const int64_t first = pixels->y[done + begin];
        for (end = begin + 1; end < size && pixels->y[done + end] == first + end - begin;) ++end;
        const auto there = static_cast<__mmask32>((uint64_t{1} << (end - begin)) - 1);
        for (int64_t o = 0; o < rows; ++o) {
          const I y = _mm512_maskz_loadu_epi16(there, square[o] + begin);
          _mm512_mask_storeu_epi16(out + first + o * channel_stride, there, y);
        }
      }
    }
    done += size;
  }
};

// The lines of y that the next group writes: it comes back to a pixel for each two tiles of
// outputs, which no hardware foresees.
class Fetch {
 public:
  void expect(const TileTask& task, const Pixels& pixels) {
    at_ = end_ = nullptr;
    const int64_t outputs = task.row_tiles[task.count - 1].first +
                            task.row_tiles[task.count - 1].outputs - task.row_tiles[0].first;
    const int64_t last = pixels.count - 1;
    if (last < 0 || pixels.y[last] - pixels.y[0] != last * task.pixel_stride) return;
    if (2 * outputs < task.pixel_stride) return;
    at_ = reinterpret_cast<const char*>(static_cast<const uint16_t*>(task.epilogue.out) +
                                        pixels.y[0] + task.row_tiles[0].first);
    end_ = at_ + 2 * (last * task.pixel_stride + outputs);
  }
  // For each tile of weights: none where these give time enough.
  int64_t lines(int64_t products) const {
    const int64_t all = (end_ - at_) / kLine;
    return all < 8 * products ? 0 : (all + products - 1) / products;
  }
  void some(int64_t lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += kLine) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace gossamer::blocksparse
