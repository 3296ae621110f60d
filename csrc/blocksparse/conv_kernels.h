#pragma once
// The convolution kernels whose lanes are pixels, written once over a vector vocabulary S
// (common/simd_*.h) and the storage type T of x and y.
//
//   panel of x, in L2     channel 0 | x[q] | x[q+1] | ...     consecutive pixels of the strip
//                         channel 1 | x[q] | x[q+1] | ...
//   a weight              | W[n, c] | W[n, c] | ...           broadcast
//   sums                  | y[n, q] | y[n, q+1] | ...
//
// Lanes are pixels, so blocks of any size fill them. `Rows` outputs share a register of x, and
// `Vectors` registers of pixels a broadcast weight: (Rows + Vectors) loads for Rows * Vectors
// multiply-adds.
#include "blocksparse/blocksparse.h"
#include "blocksparse/conv_outputs.h"
#include "blocksparse/conv_place.h"
#include "blocksparse/conv_unit.h"
#include "common/simd_finish.h"

namespace gossamer::blocksparse {

template <class S>
struct ConvMultiply {
  using F = typename S::F;
  // Sums, which leave registers for `Vectors` of x and a weight.
  static constexpr int kSums = S::kLanes == 16 ? 24 : 12;
  static constexpr int kChunk = S::kLanes == 16 ? 8 : 4;

  template <int Rows, int Vectors>
  static void multiply(const Chunk& chunk, const float* panel, int64_t channel_stride, float* sums,
                       int64_t sums_stride) {
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
        S::store(sums + r * sums_stride + v * S::kLanes, sum[r][v]);
      }
    }
  }

  // As many registers of pixels at a time as the sums allow, in parts of nearly one size.
  template <int Rows, int Vectors>
  static void multiply_part(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums, int64_t sums_stride) {
    if (vectors == Vectors) {
      return multiply<Rows, Vectors>(chunk, panel, channel_stride, sums, sums_stride);
    }
    if constexpr (Vectors > 1) {
      multiply_part<Rows, Vectors - 1>(chunk, panel, channel_stride, vectors, sums, sums_stride);
    }
  }
  template <int Rows>
  static void multiply_tile(const Chunk& chunk, const float* panel, int64_t channel_stride,
                            int64_t vectors, float* sums, int64_t sums_stride) {
    constexpr int kVectors = kSums / Rows < kTileVectors ? kSums / Rows : kTileVectors;
    if (chunk.rows == Rows) {
      for (int64_t parts = (vectors + kVectors - 1) / kVectors; parts > 0; --parts) {
        const int64_t part = (vectors + parts - 1) / parts;
        multiply_part<Rows, kVectors>(chunk, panel, channel_stride, part, sums, sums_stride);
        panel += part * S::kLanes;
        sums += part * S::kLanes;
        vectors -= part;
      }
      return;
    }
    if constexpr (Rows > 1) {
      multiply_tile<Rows / 2>(chunk, panel, channel_stride, vectors, sums, sums_stride);
    }
  }
};

template <class S, class T>
struct ConvKernels {
  using Multiply = ConvMultiply<S>;

  static void batch(const BatchTask& task) {
    // The last row's columns past the strip's need no sums.
    const int64_t last_row = (task.images - 1) * task.image_rows + task.rows - 1;
    const int64_t all = last_row * task.pitch + task.width;
    for (int64_t q = 0; q < all; q += task.tile) {
      const int64_t end = q + task.tile < all ? q + task.tile : all;
      float* sums = task.sums;
      for (int64_t i = 0; i < task.count; ++i) {
        const Chunk& chunk = task.chunks[i];
        Multiply::template multiply_tile<Multiply::kChunk>(chunk, task.panel + q, task.slab_stride,
                                                           (end - q + S::kLanes - 1) / S::kLanes,
                                                           sums, task.tile);
        sums += chunk.rows * task.tile;
      }
      finish(task, q, end);
    }
  }

  // What of the tile [q, end) is output, in runs that follow each other in y.
  static void finish(const BatchTask& task, int64_t q, int64_t end) {
    const bool whole_rows = task.pitch == task.width;
    for (int64_t at = q; at < end;) {
      const int64_t panel_row = at / task.pitch, column = at % task.pitch;
      const int64_t image = panel_row / task.image_rows, row = panel_row % task.image_rows;
      if (row >= task.rows) {  // the next image's first is the next output
        at = (image + 1) * task.image_rows * task.pitch;
        continue;
      }
      const int64_t run_end = whole_rows ? (image * task.image_rows + task.rows) * task.pitch
                                         : panel_row * task.pitch + task.width;
      const int64_t stop = run_end < end ? run_end : end;
      if (stop > at) {
        const int64_t pixel = row * task.width + column;
        Epilogue e = task.epilogue;
        const int64_t pixel_stride = task.channels_last ? e.out_stride : 1;
        e.out = static_cast<T*>(e.out) + image * task.image_stride + pixel * pixel_stride;
        const float* sums = task.sums + (at - q);
        if (task.channels_last) {
          Finish<S, T>::all(e, sums, task.tile, stop - at, task.outputs);
        } else {
          Finish<S, T>::outputs_first(e, sums, task.tile, stop - at, task.outputs);
        }
      }
      at = whole_rows ? run_end : (panel_row + 1) * task.pitch;
    }
  }

  static void pack(const ConvShape& s, const void* x, const Strip& strip, const Panel& panel,
                   const int64_t (&offset)[3], float* plane) {
    const T* first = static_cast<const T*>(x) + strip.image * s.in_pixels() * s.in_channels +
                     panel.first_channel * s.in_channel_stride();
    if (s.channels_last) {
      pack_channels_last(s, first, strip, panel, offset, plane);
    } else {
      pack_channels_first(s, first, strip, panel, offset, plane);
    }
    // Registers that a shift moves past the last pixel read what no output needs; a subnormal there
    // would cost time.
    const int64_t count = panel.rows * panel.pitch;
    for (int64_t c = 0; c < panel.channels; ++c) {
      float* channel = plane + c * panel.slab_stride;
      for (int64_t q = count; q < panel.slab_stride; ++q) channel[q] = 0;
    }
  }

  // A row of a channel at a time.
  static void pack_channels_first(const ConvShape& s, const T* x, const Strip& strip,
                                  const Panel& panel, const int64_t (&offset)[3], float* plane) {
    const Place place(s, strip, panel, offset);
    // The columns [first, last) lie in x, which begins left of the others and ends right of them.
    int64_t first = 0, last = panel.pitch;
    while (first < last && place.column_of(first) < 0) ++first;
    while (last > first && place.column_of(last - 1) < 0) --last;
    const int64_t image_size = s.in_pixels() * s.in_channels;
    for (int64_t image = 0; image < strip.images; ++image) {
      for (int64_t c = 0; c < panel.channels; ++c) {
        const T* channel = x + image * image_size + c * s.in_pixels() + place.column_of(first);
        float* to = plane + c * panel.slab_stride + image * panel.image_rows * panel.pitch;
        for (int64_t row = 0; row < panel.image_rows; ++row, to += panel.pitch) {
          const int64_t x_row = place.row_of(row);
          const bool there = x_row >= 0 && first < last;
          const int64_t begin = there ? first : 0, end = there ? last : 0;
          for (int64_t i = 0; i < begin; ++i) to[i] = 0;
          if (there) {
            copy_pixels(channel + x_row * s.in[2], s.stride[2], end - begin, to + begin);
          }
          for (int64_t i = end; i < panel.pitch; ++i) to[i] = 0;
        }
      }
    }
  }

  static void copy_pixels(const T* from, int64_t stride, int64_t count, float* to) {
    if (stride == 1 && count >= S::kLanes) {
      for (int64_t i = 0; i + S::kLanes < count; i += S::kLanes) {
        S::store(to + i, S::load(from + i));
      }
      const int64_t last = count - S::kLanes;  // overlaps the one before
      return S::store(to + last, S::load(from + last));
    }
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
  }

  // A square of kLanes pixels by as many channels at a time is transposed.
  static void pack_channels_last(const ConvShape& s, const T* x, const Strip& strip,
                                 const Panel& panel, const int64_t (&offset)[3], float* plane) {
    const Place place(s, strip, panel, offset);
    const int64_t count = panel.rows * panel.pitch;
    int64_t row = 0, column = 0, x_row = place.row_of(0);  // of the plane, of the next pixel
    for (int64_t q = 0; q < count; q += S::kLanes) {
      const T* pixel[S::kLanes];
      for (auto& p : pixel) {
        const int64_t x_column = place.column_of(column);
        const bool there = row < panel.rows && x_row >= 0 && x_column >= 0;
        p = there ? x + (x_row * s.in[2] + x_column) * s.in_channels : nullptr;
        if (++column == panel.pitch) column = 0, x_row = place.row_of(++row);
      }
      for (int64_t c = 0; c < panel.channels; c += S::kLanes) {
        pack_square(pixel, c, panel.channels - c, plane + c * panel.slab_stride + q,
                    panel.slab_stride);
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

  static void expand(const Weight& w, int64_t begin, int64_t end, float* to) {
    constexpr int kPerWord = 4 / sizeof(T);
    const int64_t words = ceil_div(w.cols, kPerWord);
    const auto* from = static_cast<const T*>(w.values);
    for (int64_t block = begin; block < end; ++block) {
      if (w.packed) {
        expand_packed(w, from + block * words * w.rows * kPerWord, to + block * w.cols * w.rows);
      } else {
        expand_block(w, from + block * w.cols * w.rows, to + block * w.cols * w.rows);
      }
    }
  }

  static void expand_block(const Weight& w, const T* from, float* to) {
    if (w.rows % S::kLanes == 0 && w.cols % S::kLanes == 0) {
      for (int64_t r = 0; r < w.rows; r += S::kLanes) {
        for (int64_t c = 0; c < w.cols; c += S::kLanes) {
          typename S::I words[S::kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < S::kLanes; ++i) {
            words[i] = S::as_int(S::load(from + (r + i) * w.cols + c));
          }
          S::transpose(words, to + c * w.rows + r, w.rows * sizeof(float));
        }
      }
      return;
    }
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t c = 0; c < w.cols; ++c) to[c * w.rows + r] = to_float(from[r * w.cols + c]);
    }
  }

  static void expand_packed(const Weight& w, const T* from, float* to) {
    constexpr int kPerWord = 4 / sizeof(T);
    for (int64_t c = 0; c < w.cols; ++c, to += w.rows) {
      const T* column = from + c / kPerWord * w.rows * kPerWord + c % kPerWord;
      for (int64_t r = 0; r < w.rows; ++r) to[r] = to_float(column[r * kPerWord]);
    }
  }

  static constexpr Unit unit = {
      S::kLanes,
      {"pixel_lanes", 1, 1, Multiply::kChunk, false, pack, batch},
      OutputLanes<S, T>::kernel,
      finish,
      expand,
  };
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
