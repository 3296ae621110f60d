#pragma once
// The convolution kernel whose lanes are outputs, for channels-last tensors and blocks whose rows
// fill the lanes, written once over a vector vocabulary S and the storage type T of x and y.
//
//   panel of x, in L2     pixel q   | x[c] | x[c+1] | ... | x[c+15]     a slab of channels: a line
//                         pixel q+1 | x[c] | x[c+1] | ... | x[c+15]
//   weights of a channel  | W[n, c] | W[n+1, c] | ...
//   sums of pixel q       | y[q, n] | y[q, n+1] | ...                   as y has them
//
// A register of weights meets up to kMostPixels broadcast numbers of x, each of which is a load;
// two registers of weights share them. Nothing is transposed on either side, and the sums of a
// chunk are written while those of the next one are computed.
//
// What is read about once, or less, is not worth packing: then the panel is x itself, whose pixels
// are further apart.
#include "blocksparse/conv_place.h"
#include "blocksparse/conv_unit.h"
#include "common/simd_finish.h"

namespace gossamer::blocksparse {
namespace {

constexpr int kSlab = 16;

// Channel after channel of some pixels.
template <int Pixels>
struct PackedPixels {
  const float* x;
  PackedPixels(const float* first, int64_t) : x(first) {}
  const float* at(int p) const { return x + p * kSlab; }
  void next_channel() { ++x; }
};

// The same, `stride` floats apart. An address is a register and 0 to 4 strides, as the processor
// adds them: of the compiler's own choice they are many more, in memory.
template <int Pixels>
struct PlacedPixels {
  static constexpr int kSpan = 5, kBases = (Pixels + kSpan - 1) / kSpan;
  const float* base[kBases];
  int64_t stride, stride3;
  PlacedPixels(const float* first, int64_t floats) : stride(floats), stride3(3 * floats) {
    asm("" : "+r"(stride3));
#pragma GCC unroll 6
    for (int i = 0; i < kBases; ++i) base[i] = first + kSpan * i * stride;
  }
  const float* at(int p) const {
    return base[p / kSpan] + (p % kSpan == 3 ? stride3 : p % kSpan * stride);
  }
  void next_channel() {
#pragma GCC unroll 6
    for (auto& b : base) {
      ++b;
      asm("" : "+r"(b));
    }
  }
};

template <class S>
struct OutputMultiply {
  using F = typename S::F;
  // Sums, which leave registers for the weights and a number of x.
  static constexpr int kSums = S::kLanes == 16 ? kMostPixels : 12;

  // Sums of `Vectors` registers of outputs for `Pixels` pixels: [pixel][output].
  template <int Vectors, int Pixels, template <int> class At>
  static void multiply(const Chunk& chunk, const float* panel, int64_t slab_stride,
                       int64_t pixel_stride, float* sums) {
    F sum[Pixels][Vectors];
#pragma GCC unroll 28
    for (auto& pixel : sum) {
#pragma GCC unroll 2
      for (F& s : pixel) s = S::zero();
    }
    const int64_t column_stride = chunk.column_stride;
    for (int64_t b = 0; b < chunk.count; ++b) {
      const float* slab = panel + chunk.blocks[b].x;
      const float* weight = chunk.weights + b * chunk.block_stride;
      for (int64_t left = chunk.blocks[b].columns; left > 0; left -= kSlab, slab += slab_stride) {
        At<Pixels> x(slab, pixel_stride);
        const float* const end = weight + (left < kSlab ? left : kSlab) * column_stride;
        // The pixels of the next slab, two or one for each column of this one.
        const float* next = left > kSlab          ? slab + slab_stride
                            : b + 1 < chunk.count ? panel + chunk.blocks[b + 1].x
                                                  : slab;
        for (; weight != end; weight += column_stride, x.next_channel()) {
          if constexpr (Pixels > 1) {
#pragma GCC unroll 2
            for (int i = 0; i < 2 / Vectors; ++i, next += pixel_stride) __builtin_prefetch(next);
          }
          F w[Vectors];
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) w[v] = S::load(weight + v * S::kLanes);
#pragma GCC unroll 28
          for (int p = 0; p < Pixels; ++p) {
            const F number = S::broadcast(x.at(p));
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) sum[p][v] = S::fma(w[v], number, sum[p][v]);
          }
        }
      }
    }
#pragma GCC unroll 28
    for (int p = 0; p < Pixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) S::store(sums + (p * Vectors + v) * S::kLanes, sum[p][v]);
    }
  }

  // The kernel of the next even number of pixels, or of one.
  template <int Vectors, template <int> class At, int Pixels = kSums / Vectors>
  static void multiply_tile(const Chunk& chunk, const float* panel, int64_t slab_stride,
                            int64_t pixel_stride, int64_t pixels, float* sums) {
    constexpr int kNext = Pixels > 2 ? Pixels - 2 : 1;
    if constexpr (Pixels > 1) {
      if (pixels <= kNext) {
        return multiply_tile<Vectors, At, kNext>(chunk, panel, slab_stride, pixel_stride, pixels,
                                                 sums);
      }
    }
    multiply<Vectors, Pixels, At>(chunk, panel, slab_stride, pixel_stride, sums);
  }
};

template <class S, class T>
struct OutputLanes {
  using Multiply = OutputMultiply<S>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(float);

  static void batch(const BatchTask& task) {
    if constexpr (kInPlace) {
      if (task.pixel_stride > kSlab) return tiles<PlacedPixels>(task, task.pixel_stride);
    }
    tiles<PackedPixels>(task, kSlab);
  }

  template <template <int> class At>
  static void tiles(const BatchTask& task, int64_t pixel_stride) {
    // Runs of pixels that follow each other both in the panel and in y.
    const bool whole_rows = task.pitch == task.width;
    const int64_t runs = whole_rows ? 1 : task.rows;
    const int64_t length = whole_rows ? task.rows * task.width : task.width;
    const int64_t count = (length + Multiply::kSums - 1) / Multiply::kSums;
    for (int64_t image = 0; image < task.images; ++image) {
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t first = (image * task.image_rows + run) * task.pitch;
        T* y = static_cast<T*>(task.epilogue.out) + image * task.image_stride +
               run * task.width * task.epilogue.out_stride;
        for (int64_t t = 0; t < count; ++t) {
          const int64_t end = length * (t + 1) / count;
          int64_t begin = length * t / count;
          // No pixel past the last one is there to be read.
          if (pixel_stride > kSlab && end == length && (end - begin) % 2 != 0) --begin;
          tile<At>(task, task.panel + (first + begin) * pixel_stride, pixel_stride, end - begin,
                   y + begin * task.epilogue.out_stride);
        }
      }
    }
  }

  template <template <int> class At>
  static void tile(const BatchTask& task, const float* panel, int64_t pixel_stride, int64_t pixels,
                   T* y) {
    alignas(64) float sums[Multiply::kSums * S::kLanes];
    int64_t output = 0;
    for (int64_t i = 0; i < task.count; ++i) {
      const Chunk& chunk = task.chunks[i];
      if (chunk.rows == S::kLanes) {
        Multiply::template multiply_tile<1, At>(chunk, panel, task.slab_stride, pixel_stride,
                                                pixels, sums);
        write<1>(task.epilogue, output, chunk.outputs, sums, pixels, y);
      } else {
        constexpr int64_t kHalf = Multiply::kSums / 2;
        for (int64_t p = 0; p < pixels; p += kHalf) {
          const int64_t count = pixels - p < kHalf ? pixels - p : kHalf;
          Multiply::template multiply_tile<2, At>(chunk, panel + p * pixel_stride, task.slab_stride,
                                                  pixel_stride, count, sums);
          write<2>(task.epilogue, output, chunk.outputs, sums, count,
                   y + p * task.epilogue.out_stride);
        }
      }
      output += chunk.outputs;
    }
  }

  template <int Vectors>
  static void write(const Epilogue& e, int64_t output, int64_t outputs, const float* sums,
                    int64_t pixels, T* y) {
    constexpr int kOutputs = Vectors * S::kLanes;
    float bias[kOutputs];
    Finish<S, T>::load_bias(e, output, bias);
    for (int64_t p = 0; p < pixels; ++p, sums += kOutputs) {
      T* out = y + p * e.out_stride + output;
      const T* residual = Finish<S, T>::residual_of(e, out);
      alignas(64) T padded[kOutputs];
      T* const to = outputs == kOutputs ? out : padded;
#pragma GCC unroll 2
      for (int v = 0; v < kOutputs; v += S::kLanes) {
        auto sum = S::add(S::load(sums + v), S::load(bias + v));
        if (e.residual != 0 && v < outputs) {
          sum = S::add(sum, Finish<S, T>::load_some(residual + v, outputs - v));
        }
        S::store(to + v, Finish<S, T>::activate(sum, e.activation));
      }
      if (outputs != kOutputs) __builtin_memcpy(out, padded, outputs * sizeof(T));
    }
  }

  static void pack(const ConvShape& s, const void* x, const Strip& strip, const Panel& panel,
                   const int64_t (&offset)[3], float* plane) {
    const Place place(s, strip, panel, offset);
    const T* first = static_cast<const T*>(x) + strip.image * s.in_pixels() * s.in_channels +
                     panel.first_channel;
    int64_t q = 0;
    for (int64_t row = 0; row < panel.rows; ++row) {
      const int64_t x_row = place.row_of(row);
      for (int64_t column = 0; column < panel.pitch; ++column, ++q) {
        const int64_t x_column = place.column_of(column);
        const bool there = x_row >= 0 && x_column >= 0;
        pack_pixel(there ? first + (x_row * s.in[2] + x_column) * s.in_channels : nullptr, panel,
                   plane + q * kSlab);
      }
    }
    // Tiles that a shift moves past the last pixel read what no output needs; a subnormal there
    // would cost time.
    for (; q < panel.slab_stride / kSlab; ++q) pack_pixel(nullptr, panel, plane + q * kSlab);
  }

  static void pack_pixel(const T* from, const Panel& panel, float* to) {
    for (int64_t c = 0; c < panel.channels; c += kSlab, to += panel.slab_stride) {
      if (from != nullptr && panel.channels - c >= kSlab) {
        for (int64_t i = 0; i < kSlab; i += S::kLanes) S::store(to + i, S::load(from + c + i));
        continue;
      }
      T padded[kSlab] = {};
      if (from != nullptr) __builtin_memcpy(padded, from + c, (panel.channels - c) * sizeof(T));
      for (int64_t i = 0; i < kSlab; i += S::kLanes) S::store(to + i, S::load(padded + i));
    }
  }

  static constexpr Kernel kernel = {"output_lanes", kSlab, S::kLanes, 2 * S::kLanes,
                                    kInPlace,       pack,  batch};
};

}  // namespace
}  // namespace gossamer::blocksparse
