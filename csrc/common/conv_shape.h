#pragma once
// Where a convolution takes its inputs from. Tensors are contiguous: channels last, x is
// [batch, d, h, w, C_in] and y [batch, d, h, w, C_out], or first, [batch, C_in, d, h, w] and
// [batch, C_out, d, h, w]; a 1-D or 2-D convolution has leading extents of 1. Of
// output position o along an axis, tap t of the kernel sees x at
//
//   o * stride + t * dilation - padding
//
// and x reads as 0 where that lies outside of it. Group g takes the input channels from
// g * group_in() on and gives the outputs from g * group_out() on. A linear layer is the case in
// which the kernel and all extents are 1 and the batch is its rows.
#include <cstdint>

namespace gossamer {

struct ConvShape {
  bool channels_last;
  int64_t batch;
  int64_t in[3];  // extents of x: d, h, w
  int64_t in_channels;
  int64_t out[3];  // extents of y
  int64_t out_channels;
  int64_t groups;  // divides both numbers of channels
  int64_t kernel[3], stride[3], dilation[3];
  int64_t padding[3];  // zeros before the first element; those behind the last follow from `out`

  // Whether pixel i of y sees pixel i of x and no other.
  bool is_pointwise() const {
    bool itself = taps() == 1;
    for (int axis = 0; axis < 3; ++axis) {
      itself = itself && stride[axis] == 1 && padding[axis] == 0 && in[axis] == out[axis];
    }
    return itself;
  }
  // The last position along an axis that a pixel of y sees, from the first that one sees; of huge
  // sizes a rounded number.
  double reach(int axis) const {
    return static_cast<double>(out[axis] - 1) * stride[axis] +
           static_cast<double>(kernel[axis] - 1) * dilation[axis];
  }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  // Between neighbouring channels of a pixel, and neighbouring pixels of a channel.
  int64_t in_channel_stride() const { return channels_last ? 1 : in_pixels(); }
  int64_t in_pixel_stride() const { return channels_last ? in_channels : 1; }
  int64_t out_channel_stride() const { return channels_last ? 1 : out_pixels(); }
  int64_t out_pixel_stride() const { return channels_last ? out_channels : 1; }
  int64_t in_pixels() const { return in[0] * in[1] * in[2]; }  // of one image
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
};

}  // namespace gossamer
