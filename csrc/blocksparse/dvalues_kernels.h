#pragma once
// The gradient of the live blocks, written once over a vector vocabulary S (common/simd_*.h) and the
// storage type T of x and dy.
//
//   panel of x, in L2   pixel q   | x[c] | x[c+1] | ... | x[c+15]    a piece of a block's columns
//                       pixel q+1 | x[c] | x[c+1] | ... | x[c+15]    at its tap
//   dy of a strip       pixel q   | dy[n] | dy[n+1] | ...            broadcast one by one
//   sums                          | dW[n, c] | dW[n, c+1] | ...      in registers, as values has them
//
// 16 rows of a block meet a register of x; of blocks of fewer rows several pieces share them. Either
// way a multiply-add costs little more than one load.
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

  static void pack_x(const ConvShape& s, const void* x, const Strip& strip, const Panel& panel,
                     const Slabs& slabs, const int64_t (&offset)[3], float* plane) {
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

  static void pack_dy(const ConvShape& s, const void* dy, const Strip& strip, const Rows& rows,
                      int64_t begin, int64_t end, float* to) {
    const int64_t group_out = s.group_out(), row_blocks = ceil_div(group_out, rows.of_block);
    const int64_t pixels = strip.images * strip.rows * strip.width;
    int64_t q = 0;
    for (int64_t image = 0; image < strip.images; ++image) {
      for (int64_t row = 0; row < strip.rows; ++row) {
        const int64_t line = ((strip.image + image) * s.out[0] + strip.depth) * s.out[1];
        const T* from = static_cast<const T*>(dy) +
                        ((line + strip.row + row) * s.out[2] + strip.column) * s.out_channels;
        for (int64_t column = 0; column < strip.width; ++column, ++q, from += s.out_channels) {
          float* block = to;
          for (int64_t at = begin; at < end; ++at) {
            const int64_t in_group = at % row_blocks * rows.of_block;
            const T* channels = from + at / row_blocks * group_out + in_group;
            for (int64_t r = 0; r < rows.of_block;) {
              const int64_t part = rows.part(r);
              int64_t count = rows.of_block - r < part ? rows.of_block - r : part;
              if (count > group_out - in_group - r) count = group_out - in_group - r;
              copy(channels + r, count < 0 ? 0 : count, part, block + q * part);
              block += part * pixels, r += part;
            }
          }
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
