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

template <class S>
struct ConvMultiply {
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
    const int64_t column_stride = chunk.column_stride;
    for (int64_t b = 0; b < chunk.count; ++b) {
      const float* x = panel + chunk.blocks[b].x;
      const auto* weight =
          reinterpret_cast<const uint32_t*>(chunk.weights + b * chunk.block_stride);
      for (int64_t c = chunk.blocks[b].columns; c > 0;
           --c, x += channel_stride, weight += column_stride) {
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

  // As many registers of pixels at a time as the sums allow, in parts of nearly one size.
  template <int Rows, int Vectors>
  static void multiply_part(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums) {
    if (vectors == Vectors) return multiply<Rows, Vectors>(chunk, panel, channel_stride, sums);
    if constexpr (Vectors > 1) {
      multiply_part<Rows, Vectors - 1>(chunk, panel, channel_stride, vectors, sums);
    }
  }
  template <int Rows>
  static void multiply_tile(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums) {
    constexpr int kVectors = kSums / Rows < kTileVectors ? kSums / Rows : kTileVectors;
    if (chunk.rows == Rows) {
      for (int64_t parts = (vectors + kVectors - 1) / kVectors; parts > 0; --parts) {
        const int64_t part = (vectors + parts - 1) / parts;
        multiply_part<Rows, kVectors>(chunk, panel, channel_stride, part, sums);
        panel += part * S::kLanes;
        sums += part * S::kLanes;
        vectors -= part;
      }
      return;
    }
    if constexpr (Rows > 1) {
      multiply_tile<Rows / 2>(chunk, panel, channel_stride, vectors, sums);
    }
  }
};

template <class S, class T>
struct ConvKernels {
  using Multiply = ConvMultiply<S>;
  static constexpr int64_t kTilePixels = Multiply::kTilePixels;

  static void batch(const BatchTask& task) {
    // The last row's columns past the strip's need no sums.
    const int64_t all = (task.rows - 1) * task.pitch + task.width;
    for (int64_t q = 0; q < all; q += kTilePixels) {
      const int64_t end = q + kTilePixels < all ? q + kTilePixels : all;
      float* sums = task.sums;
      for (int64_t i = 0; i < task.count; ++i) {
        const Chunk& chunk = task.chunks[i];
        Multiply::template multiply_tile<Multiply::kChunk>(
            chunk, task.panel + q, task.channel_stride, (end - q + S::kLanes - 1) / S::kLanes,
            sums);
        sums += chunk.rows * kTilePixels;
      }
      finish(task, q, end);
    }
  }

  // What of the tile [q, end) is output, row by row of the strip.
  static void finish(const BatchTask& task, int64_t q, int64_t end) {
    for (int64_t at = q; at < end;) {
      const int64_t row = at / task.pitch, column = at % task.pitch;
      const int64_t row_end = (row + 1) * task.pitch;
      const int64_t outputs = row * task.pitch + task.width;  // end of the row's
      const int64_t stop = task.pitch == task.width ? end : outputs < end ? outputs : end;
      if (stop > at) {
        Epilogue e = task.epilogue;
        e.out = static_cast<T*>(e.out) + (row * task.width + column) * e.out_stride;
        Finish<S, T>::all(e, task.sums + (at - q), kTilePixels, stop - at, task.outputs);
      }
      at = task.pitch == task.width ? end : row_end;
    }
  }

  // x channels-last: a square of kLanes pixels by as many channels at a time is transposed.
  static void pack(const ConvShape& s, const void* all_x, const Strip& strip, const Panel& panel,
                   const int64_t (&offset)[3], float* plane) {
    const T* x = static_cast<const T*>(all_x) + panel.first_channel;
    const int64_t depth = strip.depth * s.stride[0] + offset[0] - s.padding[0];
    const bool in_depth = depth >= 0 && depth < s.in[0];
    const int64_t count = panel.rows * panel.pitch;
    int64_t row = 0, column = 0;  // of the plane, of the next pixel
    for (int64_t q = 0; q < count; q += S::kLanes) {
      const T* pixel[S::kLanes];
      for (auto& p : pixel) {
        p = nullptr;
        if (row == panel.rows) continue;
        const int64_t at_h = (strip.row + row) * s.stride[1] + offset[1] - s.padding[1];
        const int64_t at_w = (strip.column + column) * s.stride[2] + offset[2] - s.padding[2];
        if (in_depth && at_h >= 0 && at_h < s.in[1] && at_w >= 0 && at_w < s.in[2]) {
          const int64_t within = (depth * s.in[1] + at_h) * s.in[2] + at_w;
          p = x + (strip.image * s.in_pixels() + within) * s.in_channels;
        }
        if (++column == panel.pitch) column = 0, ++row;
      }
      for (int64_t c = 0; c < panel.channels; c += S::kLanes) {
        pack_square(pixel, c, panel.channels - c, plane + c * panel.channel_stride + q,
                    panel.channel_stride);
      }
    }
    // Registers that a shift moves past the last pixel read what no output needs; a subnormal there
    // would cost time.
    const int64_t packed = (count + S::kLanes - 1) / S::kLanes * S::kLanes;
    for (int64_t c = 0; c < panel.channels; ++c) {
      float* channel = plane + c * panel.channel_stride;
      for (int64_t q = packed; q < panel.channel_stride; q += S::kLanes) {
        S::store(channel + q, S::zero());
      }
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

  static void expand(const void* values, int64_t rows, int64_t cols, int64_t count, float* to) {
    const auto* from = static_cast<const T*>(values);
    const bool squares = rows % S::kLanes == 0 && cols % S::kLanes == 0;
    for (int64_t block = 0; block < count; ++block, from += rows * cols, to += rows * cols) {
      if (squares) {
        for (int64_t r = 0; r < rows; r += S::kLanes) {
          for (int64_t c = 0; c < cols; c += S::kLanes) {
            typename S::I words[S::kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < S::kLanes; ++i) {
              words[i] = S::as_int(S::load(from + (r + i) * cols + c));
            }
            S::transpose(words, to + c * rows + r, rows * sizeof(float));
          }
        }
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) to[c * rows + r] = to_float(from[r * cols + c]);
      }
    }
  }

  static constexpr Unit unit = {S::kLanes, Multiply::kChunk, pack, batch, expand};
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
