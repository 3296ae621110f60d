#pragma once
// x of a 2:4 convolution, for the Hopper GEMMs: rows are what the pixels of y see of it, tap after
// tap the channels. TMA gathers a step of as many rows as a tile has with one instruction: its
// im2col mode walks along the pixels of y and moves by a tap's place in the kernel.
#include "sparse24/conv_cuda.h"
#include "sparse24/gemm_sm90_tile.cuh"

namespace gossamer::sparse24 {
namespace {

struct PixelMap {
  TensorMap map;
  int taps, channels;  // channels: of a tap, a multiple of a step's
  int out_h, out_w;    // of an image of y
  int stride_h, stride_w;
  int padding_h, padding_w;
  int kernel_w, dilation_h, dilation_w;

  struct Tile {
    const PixelMap& x;
    int n, h, w;  // where the first pixel has tap 0

    __device__ Tile(const PixelMap& x_, int first) : x(x_) {
      const int row = first / x.out_w;
      n = row / x.out_h;
      h = (row - n * x.out_h) * x.stride_h - x.padding_h;
      w = (first - row * x.out_w) * x.stride_w - x.padding_w;
    }
    template <int kBlocks>
    __device__ void load(void* to, uint64_t* full, int column) const {
      const int tap = column / x.channels, line = tap / x.kernel_w;
      // Past the last tap: channels that x does not have.
      const int c = tap < x.taps ? column - tap * x.channels : x.channels;
      const auto offset_h = static_cast<uint16_t>(tap < x.taps ? line * x.dilation_h : 0);
      const auto offset_w = static_cast<uint16_t>((tap - line * x.kernel_w) * x.dilation_w);
      if constexpr (kBlocks == 1) {
        ptx::tma_load_im2col(to, &x.map, full, c, w, h, n, offset_w, offset_h);
      } else {
        ptx::tma_load_im2col_multicast(to, &x.map, full, c, w, h, n, offset_w, offset_h,
                                       (1 << kBlocks) - 1);
      }
    }
  };
};

inline PixelMap pixel_map(const CudaConvArgs& args, int tokens) {
  const ConvShape& s = args.shape;
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  const int64_t size = size_of(args.gemm.dtype), images = s.batch * s.in[0];
  const int64_t extents[] = {s.in_channels, s.in[2], s.in[1], images};
  const int64_t row = s.in_channels * size, pitch[] = {row, row * s.in[2], row * s.in[2] * s.in[1]};
  const int lower[] = {number(-s.padding[2]), number(-s.padding[1])};
  const int upper[] = {number(im2col_upper(s, 2)), number(im2col_upper(s, 1))};
  const int steps[] = {number(s.stride[2]), number(s.stride[1])};
  PixelMap x{};
  x.map = im2col_map(args.gemm.x, number(size), extents, pitch, lower, upper, steps,
                     number(kStepBytes / size), tokens, Swizzle::k128);
  x.taps = number(s.taps()), x.channels = number(s.in_channels);
  x.out_h = number(s.out[1]), x.out_w = number(s.out[2]);
  x.stride_h = number(s.stride[1]), x.stride_w = number(s.stride[2]);
  x.padding_h = number(s.padding[1]), x.padding_w = number(s.padding[2]);
  x.kernel_w = number(s.kernel[2]);
  x.dilation_h = number(s.dilation[1]), x.dilation_w = number(s.dilation[2]);
  return x;
}

}  // namespace
}  // namespace gossamer::sparse24
