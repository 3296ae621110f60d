#pragma once
// Where the pixels of a convolution's y take x from, for kernels that gather it.
#include <cstdint>

#include "common/conv_shape.h"
#include "common/launch.cuh"

namespace gossamer {

// A convolution's pixels and channels, in elements.
struct ConvPixels {
  int in[3], out[3], stride[3], dilation[3], padding[3];
  int kernel_h, kernel_w;
  bool channels_last;
  int64_t pixels;  // of y, all images together
  int64_t in_pixels, in_channels, out_pixels, out_channels;

  ConvPixels() = default;
  explicit ConvPixels(const ConvShape& s)
      : kernel_h(static_cast<int>(s.kernel[1])),
        kernel_w(static_cast<int>(s.kernel[2])),
        channels_last(s.channels_last),
        pixels(s.batch * s.out_pixels()),
        in_pixels(s.in_pixels()),
        in_channels(s.in_channels),
        out_pixels(s.out_pixels()),
        out_channels(s.out_channels) {
    for (int axis = 0; axis < 3; ++axis) {
      in[axis] = static_cast<int>(s.in[axis]), out[axis] = static_cast<int>(s.out[axis]);
      stride[axis] = static_cast<int>(s.stride[axis]);
      dilation[axis] = static_cast<int>(s.dilation[axis]);
      padding[axis] = static_cast<int>(s.padding[axis]);
    }
  }

  __device__ int64_t in_channel_stride() const { return channels_last ? 1 : in_pixels; }
  __device__ int64_t in_pixel_stride() const { return channels_last ? in_channels : 1; }
  __device__ int64_t out_channel_stride() const { return channels_last ? 1 : out_pixels; }
  // Of output channel 0.
  __device__ int64_t out_offset(int64_t pixel) const {
    if (channels_last) return pixel * out_channels;
    const int64_t image = pixel / out_pixels;
    return image * out_pixels * out_channels + (pixel - image * out_pixels);
  }
};

// Where a pixel of y has tap 0 in x, which may be outside. 16 bytes, for one load.
struct alignas(16) Position {
  int at[3];  // d, h, w
  int there;  // 0 past the last pixel
};

__device__ __forceinline__ Position position_of(const ConvPixels& conv, int64_t pixel,
                                                int64_t* offset) {
  Position position{};
  *offset = 0;
  if (pixel >= conv.pixels) return position;
  const int64_t image = pixel / conv.out_pixels;
  auto within = static_cast<unsigned>(pixel - image * conv.out_pixels);
  int o[3];
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    o[axis] = static_cast<int>(within % static_cast<unsigned>(conv.out[axis]));
    within /= static_cast<unsigned>(conv.out[axis]);
  }
  int64_t at = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    position.at[axis] = o[axis] * conv.stride[axis] - conv.padding[axis];
    at = at * conv.in[axis] + position.at[axis];
  }
  position.there = 1;
  *offset = image * conv.in_pixels * conv.in_channels + at * conv.in_pixel_stride();
  return position;
}

// One tap of the kernel.
class Tap {
 public:
  __device__ void move_to(const ConvPixels& conv, int tap) {
    const int line = tap / conv.kernel_w, plane = line / conv.kernel_h;
    shift_[0] = plane * conv.dilation[0];
    shift_[1] = (line - plane * conv.kernel_h) * conv.dilation[1];
    shift_[2] = (tap - line * conv.kernel_w) * conv.dilation[2];
    const int64_t at = (int64_t{shift_[0]} * conv.in[1] + shift_[1]) * conv.in[2] + shift_[2];
    offset_ = at * conv.in_pixel_stride();
  }

  // Whether x has the pixel that this tap sees from there.
  __device__ bool sees(const ConvPixels& conv, const Position& from) const {
    bool inside = from.there != 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      inside &= static_cast<unsigned>(from.at[axis] + shift_[axis]) <
                static_cast<unsigned>(conv.in[axis]);
    }
    return inside;
  }

  // Of that pixel, against that of tap 0.
  __device__ int64_t offset() const { return offset_; }

 private:
  int shift_[3] = {};  // of x against tap 0
  int64_t offset_ = 0;
};

}  // namespace gossamer
