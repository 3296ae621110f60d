#pragma once
// The gradient of the live blocks, written once over a vector vocabulary S (common/simd_*.h) and
// the storage type T of x and dy.
//
//   panel of x, in L2   pixel q   | x[c] | x[c+1] | ... | x[c+15]    a piece of a block's columns
//                       pixel q+1 | x[c] | x[c+1] | ... | x[c+15]    at its tap
//   dy of a strip       pixel q   | dy[n] | dy[n+1] | ...            broadcast one by one
//   sums                          | dW[n, c] | dW[n, c+1] | ...      in registers, as values has
//   them
//
// 16 rows of a block meet a register of x; of blocks of fewer rows several pieces share them.
// Either way a multiply-add costs little more than one load.
#include "blocksparse/conv_place.h"
#include "blocksparse/dvalues_unit.h"

namespace gossamer::blocksparse {
namespace {

template <class S>
struct DvaluesMultiply {
  using F = typename S::F;
  static constexpr int kSums = S::kLanes == 16 ? 16 : 8;
  static constexpr int kMostPieces = 8;  // each has an address of its own

  template <int Part, int Pieces>
  static void multiply(const DvaluesPass& pass, int64_t first) {
    F sum[Pieces][Part];
#pragma GCC unroll 8
    for (auto& piece : sum) {
#pragma GCC unroll 16
      for (F& s : piece) s = S::zero();
    }
    int64_t offset[Pieces];
    for (int i = 0; i < Pieces; ++i) offset[i] = pass.offsets[first + i];
    const float* dy = pass.dy;
    for (int64_t image = 0; image < pass.images; ++image) {
      for (int64_t row = 0; row < pass.rows; ++row) {
        const float* x = pass.x + image * pass.image_stride + row * pass.row_stride;
        for (const float* const end = x + pass.length * S::kLanes; x != end;
             x += S::kLanes, dy += Part) {
          F columns[Pieces];
#pragma GCC unroll 8
          for (int i = 0; i < Pieces; ++i) columns[i] = S::load(x + offset[i]);
#pragma GCC unroll 16
          for (int r = 0; r < Part; ++r) {
            const F number = S::broadcast(dy + r);
#pragma GCC unroll 8
            for (int i = 0; i < Pieces; ++i) sum[i][r] = S::fma(columns[i], number, sum[i][r]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Pieces; ++i) {
      float* to = pass.sums + (first + i) * pass.piece_stride;
#pragma GCC unroll 16
      for (int r = 0; r < Part; ++r) {
        S::store(to + r * S::kLanes, S::add(S::load(to + r * S::kLanes), sum[i][r]));
      }
    }
  }

  template <int Part, int Pieces>
  static void pieces(const DvaluesPass& pass, int64_t first) {
    for (; pass.pieces - first >= Pieces; first += Pieces) multiply<Part, Pieces>(pass, first);
    if constexpr (Pieces > 1) pieces<Part, Pieces / 2>(pass, first);
  }

  template <int Part>
  static void parts(const DvaluesPass& pass) {
    if (pass.part == Part) {
      constexpr int kPieces = kSums / Part < kMostPieces ? kSums / Part : kMostPieces;
      return pieces<Part, kPieces>(pass, 0);
    }
    if constexpr (Part > 1) parts<Part / 2>(pass);
  }
};

template <class S, class T>
struct DvaluesKernels {
  // `count` numbers, and zeros up to `padded`.
  static void copy(const T* from, int64_t count, int64_t padded, float* to) {
    if (count == S::kLanes) return S::store(to, S::load(from));
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    for (int64_t i = count; i < padded; ++i) to[i] = 0;
  }

  // to[pixel][0..width) of `channels` channels, and zeros after them; at most a square of lanes.
  static void square(const T* from, int64_t channel_stride, int64_t channels, int64_t pixel_stride,
                     int64_t pixels, float* to, int64_t width) {
    typename S::I words[S::kLanes];
    const bool whole = pixel_stride == 1 && pixels >= S::kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      const T* channel = from + i * channel_stride;
      if (i >= channels) {
        words[i] = S::set1(0u);
      } else if (whole) {
        words[i] = S::as_int(S::load(channel));
      } else {
        T padded[S::kLanes] = {};
        for (int64_t p = 0; p < pixels && p < S::kLanes; ++p) padded[p] = channel[p * pixel_stride];
        words[i] = S::as_int(S::load(padded));
      }
    }
    if (pixels >= S::kLanes && width == S::kLanes) {
      return S::transpose(words, to, S::kLanes * sizeof(float));
    }
    alignas(64) float pixel[S::kLanes][S::kLanes];
    S::transpose(words, pixel, sizeof pixel[0]);
    for (int64_t p = 0; p < pixels && p < S::kLanes; ++p) {
      __builtin_memcpy(to + p * width, pixel[p], width * sizeof(float));
    }
  }

  // The same of any number of pixels.
  static void turn(const T* from, int64_t channel_stride, int64_t channels, int64_t pixel_stride,
                   int64_t pixels, float* to, int64_t width) {
    for (int64_t p = 0; p < pixels; p += S::kLanes) {
      // The last square overlaps the one before.
      const int64_t at = pixels < S::kLanes || pixels - p >= S::kLanes ? p : pixels - S::kLanes;
      square(from + at * pixel_stride, channel_stride, channels, pixel_stride, pixels - at,
             to + at * width, width);
    }
  }

  static void pack_x(const ConvShape& s, const void* x, const Strip& strip, const Panel& panel,
                     const Slabs& slabs, const int64_t (&offset)[3], float* plane) {
    if (s.channels_last) {
      pack_channels_last(s, x, strip, panel, slabs, offset, plane);
    } else {
      pack_channels_first(s, x, strip, panel, slabs, offset, plane);
    }
  }

  // A row of a slab at a time.
  static void pack_channels_first(const ConvShape& s, const void* x, const Strip& strip,
                                  const Panel& panel, const Slabs& slabs,
                                  const int64_t (&offset)[3], float* plane) {
    const Place place(s, strip, panel, offset);
    // The columns [first, last) lie in x, which begins left of the others and ends right of them.
    int64_t first = 0, last = panel.pitch;
    while (first < last && place.column_of(first) < 0) ++first;
    while (last > first && place.column_of(last - 1) < 0) --last;
    const T* image = static_cast<const T*>(x) +
                     (strip.image * s.in_channels + panel.first_channel) * s.in_pixels() +
                     (first < last ? place.column_of(first) : 0);
    const auto clear = [&](int64_t from, int64_t to) {
      for (float* at = plane + from * S::kLanes; at != plane + to * S::kLanes; at += S::kLanes) {
        S::store(at, S::zero());
      }
    };
    for (int64_t group = 0; group < slabs.groups; ++group) {
      for (int64_t c = 0; c < slabs.of_group(); ++c, plane += panel.slab_stride) {
        const int64_t in_span = c % slabs.of_span() * S::kLanes;
        const int64_t channel = c / slabs.of_span() * slabs.span + in_span;
        int64_t channels = slabs.channels - channel;
        if (channels > slabs.span - in_span) channels = slabs.span - in_span;
        for (int64_t row = 0; row < panel.rows; ++row) {
          const int64_t q = row * panel.pitch, x_row = place.row_of(row);
          const bool there = x_row >= 0 && first < last && channels > 0;
          const int64_t begin = there ? first : 0, end = there ? last : 0;
          clear(q, q + begin);
          if (there) {
            // x_row counts the rows of whole images.
            const int64_t rows = s.in[0] * s.in[1], of_image = s.in_pixels() * s.in_channels;
            turn(image + x_row / rows * of_image +
                     (group * slabs.channels + channel) * s.in_pixels() + x_row % rows * s.in[2],
                 s.in_pixels(), channels, s.stride[2], end - begin, plane + (q + begin) * S::kLanes,
                 S::kLanes);
          }
          clear(q + end, q + panel.pitch);
        }
        clear(panel.rows * panel.pitch, panel.slab_stride / S::kLanes);
      }
    }
  }

  static void pack_channels_last(const ConvShape& s, const void* x, const Strip& strip,
                                 const Panel& panel, const Slabs& slabs, const int64_t (&offset)[3],
                                 float* plane) {
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
                   slabs, plane + q * S::kLanes);
      }
    }
    // A block that begins inside a slab is read past its end; a subnormal there would cost time.
    for (; q < panel.slab_stride / S::kLanes; ++q) {
      pack_pixel(nullptr, panel, slabs, plane + q * S::kLanes);
    }
  }

  static void pack_pixel(const T* from, const Panel& panel, const Slabs& slabs, float* to) {
    for (int64_t group = 0; group < slabs.groups; ++group) {
      for (int64_t span = 0; span < slabs.channels; span += slabs.span) {
        const int64_t end = span + slabs.span < slabs.channels ? span + slabs.span : slabs.channels;
        for (int64_t c = span; c < span + slabs.span; c += S::kLanes, to += panel.slab_stride) {
          const int64_t left = from == nullptr || end < c ? 0 : end - c;
          copy(from + (left > 0 ? group * slabs.channels + c : 0),
               left < S::kLanes ? left : S::kLanes, S::kLanes, to);
        }
      }
    }
  }

  // Calls body(channel, channels, part, to) for each part of the block rows [begin, end):
  // `channels` channels of dy from `channel` on, and zeros after them.
  template <class Body>
  static void for_each_part(const ConvShape& s, const Rows& rows, int64_t begin, int64_t end,
                            int64_t pixels, float* to, const Body& body) {
    const int64_t group_out = s.group_out(), row_blocks = ceil_div(group_out, rows.of_block);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t in_group = at % row_blocks * rows.of_block;
      const int64_t there =
          rows.of_block < group_out - in_group ? rows.of_block : group_out - in_group;
      for (int64_t r = 0; r < rows.of_block;) {
        const int64_t part = rows.part(r), left = there > r ? there - r : 0;
        body(at / row_blocks * group_out + in_group + (left > 0 ? r : 0), left < part ? left : part,
             part, to);
        to += part * pixels, r += part;
      }
    }
  }

  static void pack_dy(const ConvShape& s, const void* dy, const Strip& strip, const Rows& rows,
                      int64_t begin, int64_t end, float* to) {
    const int64_t pixels = strip.images * strip.rows * strip.width;
    for (int64_t image = 0; image < strip.images; ++image) {
      const T* of_image =
          static_cast<const T*>(dy) + (strip.image + image) * s.out_pixels() * s.out_channels;
      const int64_t first = (strip.depth * s.out[1] + strip.row) * s.out[2] + strip.column;
      for (int64_t row = 0; row < strip.rows; ++row) {
        const int64_t q = (image * strip.rows + row) * strip.width, at = first + row * s.out[2];
        if (s.channels_last) {
          for (int64_t column = 0; column < strip.width; ++column) {
            const T* pixel = of_image + (at + column) * s.out_channels;
            for_each_part(s, rows, begin, end, pixels, to,
                          [&](int64_t channel, int64_t channels, int64_t part, float* slab) {
                            copy(pixel + channel, channels, part, slab + (q + column) * part);
                          });
          }
        } else {
          for_each_part(s, rows, begin, end, pixels, to,
                        [&](int64_t channel, int64_t channels, int64_t part, float* slab) {
                          turn(of_image + channel * s.out_pixels() + at, s.out_pixels(), channels,
                               1, strip.width, slab + q * part, part);
                        });
        }
      }
    }
  }

  static constexpr DvaluesUnit unit = {S::kLanes, pack_x, pack_dy,
                                       DvaluesMultiply<S>::template parts<S::kLanes>};
};

template <class S>
const DvaluesUnit* dvalues_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &DvaluesKernels<S, float>::unit;
    case DType::kBFloat16: return &DvaluesKernels<S, BFloat16>::unit;
    case DType::kFloat16: return &DvaluesKernels<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::blocksparse
