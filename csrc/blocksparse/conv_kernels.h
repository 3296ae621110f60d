#pragma once
// The convolution kernels, written once over a vector vocabulary S (common/simd_*.h) and the
// storage type T of x and y.
//
//   panel of x, in L2     channel 0 | x[q] | x[q+1] | ...     consecutive pixels of the strip
//                         channel 1 | x[q] | x[q+1] | ...
//   a weight              | W[n, c] | W[n, c] | ...           broadcast
//   sums                  | y[n, q] | y[n, q+1] | ...
//
// Lanes are pixels, so blocks of any size fill them. `Rows` outputs share a register of x, and
// `Vectors` registers of pixels a broadcast weight: (Rows + Vectors) loads for Rows * Vectors
// multiply-adds.
#include "blocksparse/conv_unit.h"
#include "common/simd_finish.h"

namespace gossamer::blocksparse {

template <class S, class T>
struct ConvKernels {
  using F = typename S::F;
  // Sums, which leave registers for `Vectors` of x and a weight.
  static constexpr int kSums = S::kLanes == 16 ? 24 : 12;
  static constexpr int kChunk = S::kLanes == 16 ? 8 : 4;
  static constexpr int64_t kTilePixels = kTileVectors * S::kLanes;

  template <int Rows, int Vectors>
  static void multiply(const Chunk& chunk, const float* panel, int64_t channel_stride,
                       float* sums) {
    F sum[Rows][Vectors];
#pragma GCC unroll 8
    for (auto& row : sum) {
#pragma GCC unroll 12
      for (F& s : row) s = S::zero();
    }
    const auto* weight = reinterpret_cast<const uint32_t*>(chunk.weights);
    for (int64_t b = 0; b < chunk.count; ++b) {
      const float* x = panel + chunk.blocks[b].x;
      for (int64_t c = chunk.blocks[b].columns; c > 0; --c, x += channel_stride, weight += Rows) {
        F pixels[Vectors];
        if constexpr (Rows > 1) {
#pragma GCC unroll 12
          for (int v = 0; v < Vectors; ++v) pixels[v] = S::load(x + v * S::kLanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const F w = S::broadcast(weight + r);
#pragma GCC unroll 12
          for (int v = 0; v < Vectors; ++v) {
            sum[r][v] = S::fma(w, Rows > 1 ? pixels[v] : S::load(x + v * S::kLanes), sum[r][v]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) {
        S::store(sums + r * kTilePixels + v * S::kLanes, sum[r][v]);
      }
    }
  }

  // As many registers of pixels at a time as the sums allow, then what is left of them.
  template <int Rows, int Vectors>
  static void multiply_tile(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums) {
    for (; vectors >= Vectors; vectors -= Vectors) {
      multiply<Rows, Vectors>(chunk, panel, channel_stride, sums);
      panel += Vectors * S::kLanes;
      sums += Vectors * S::kLanes;
    }
    if constexpr (Vectors > 1) {
      if (vectors > 0) {
        multiply_tile<Rows, Vectors / 2>(chunk, panel, channel_stride, vectors, sums);
      }
    }
  }
  template <int Rows>
  static void multiply_rows(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums) {
    constexpr int kVectors = kSums / Rows < kTileVectors ? kSums / Rows : kTileVectors;
    if (chunk.rows == Rows) {
      return multiply_tile<Rows, kVectors>(chunk, panel, channel_stride, vectors, sums);
    }
    if constexpr (Rows > 1) {
      multiply_rows<Rows / 2>(chunk, panel, channel_stride, vectors, sums);
    }
  }

  static void batch(const BatchTask& task) {
    Epilogue e = task.epilogue;
    for (int64_t q = 0; q < task.pixels; q += kTilePixels) {
      const int64_t left = task.pixels - q;
      const int64_t pixels = left < kTilePixels ? left : kTilePixels;
      const int64_t vectors = (pixels + S::kLanes - 1) / S::kLanes;
      float* sums = task.sums;
      for (int64_t i = 0; i < task.count; ++i) {
        const Chunk& chunk = task.chunks[i];
        multiply_rows<kChunk>(chunk, task.panel + q, task.channel_stride, vectors, sums);
        sums += chunk.rows * kTilePixels;
      }
      Finish<S, T>::all(e, task.sums, kTilePixels, pixels, task.outputs);
      e.out = static_cast<T*>(e.out) + pixels * e.out_stride;
    }
  }

  // x channels-last: a square of kLanes pixels by as many channels at a time is transposed.
  static void pack(const ConvShape& s, const void* all_x, const Strip& strip, const Panel& panel,
                   int64_t kd, int64_t phase, int64_t kw, float* plane) {
    const T* x = static_cast<const T*>(all_x) + panel.first_channel;
    const int64_t depth = strip.depth * s.stride[0] + kd * s.dilation[0] - s.padding[0];
    const bool in_depth = depth >= 0 && depth < s.in[0];
    const int64_t count = panel.plane_rows * strip.width;
    int64_t row = 0, column = 0;  // of the plane, of the next pixel
    for (int64_t q = 0; q < count; q += S::kLanes) {
      const T* pixel[S::kLanes];
      for (auto& p : pixel) {
        p = nullptr;
        if (row == panel.plane_rows) continue;
        const int64_t at_h = (strip.row + row) * s.stride[1] + phase - s.padding[1];
        const int64_t at_w =
            (strip.column + column) * s.stride[2] + kw * s.dilation[2] - s.padding[2];
        if (in_depth && at_h >= 0 && at_h < s.in[1] && at_w >= 0 && at_w < s.in[2]) {
          const int64_t within = (depth * s.in[1] + at_h) * s.in[2] + at_w;
          p = x + (strip.image * s.in_pixels() + within) * s.in_channels;
        }
        if (++column == strip.width) column = 0, ++row;
      }
      for (int64_t c = 0; c < panel.channels; c += S::kLanes) {
        pack_square(pixel, c, panel.channels - c, plane + c * panel.channel_stride + q,
                    panel.channel_stride);
      }
    }
    // Registers that a shift moves past the last pixel read what no output needs; a subnormal there
    // would cost time.
    for (int64_t c = 0; c < panel.channels; ++c) {
      float* end = plane + (c + 1) * panel.channel_stride - S::kLanes;
      S::store(end, S::zero());
    }
  }

  static void pack_square(const T* const (&pixel)[S::kLanes], int64_t channel, int64_t channels,
                          float* to, int64_t channel_stride) {
    typename S::I words[S::kLanes];
    const bool whole = channels >= S::kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      if (pixel[i] == nullptr) {
        words[i] = S::set1(0u);
      } else if (whole) {
        words[i] = S::as_int(S::load(pixel[i] + channel));
      } else {
        T padded[S::kLanes] = {};
        __builtin_memcpy(padded, pixel[i] + channel, channels * sizeof(T));
        words[i] = S::as_int(S::load(padded));
      }
    }
    if (whole) return S::transpose(words, to, channel_stride * sizeof(float));
    alignas(64) uint32_t square[S::kLanes][S::kLanes];
    S::transpose(words, square, sizeof square[0]);
    for (int64_t c = 0; c < channels; ++c) {
      __builtin_memcpy(to + c * channel_stride, square[c], sizeof square[c]);
    }
  }

  static constexpr Unit unit = {S::kLanes, kChunk, pack, batch};
};

template <class S>
const Unit* conv_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &ConvKernels<S, float>::unit;
    case DType::kBFloat16: return &ConvKernels<S, BFloat16>::unit;
    case DType::kFloat16: return &ConvKernels<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace gossamer::blocksparse
