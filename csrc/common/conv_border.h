#pragma once
// The checks of a convolution's tensors and arguments. Included by api files only.
#include <array>

#include "common/border.h"
#include "common/conv_shape.h"

namespace gossamer {

// Sums and products of two sizes below this stay within 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 30;

constexpr double kMaxPixels = 0x1p40;

using Axes = std::array<int64_t, 3>;  // d, h, w

inline void check_size(const char* op, const char* what, int64_t size, int64_t lowest) {
  GOSSAMER_CHECK(size >= lowest && size <= kMaxSize, op, ": ", what, " is ", size, ", expected ",
                 lowest, " to 2**30");
}

inline void check_dims(const char* op, const char* what, const TensorView& t, int ndim) {
  GOSSAMER_CHECK(t.ndim == ndim, op, ": ", what, " of shape ", shape_text(t), " has ", t.ndim,
                 " dimensions, expected ", ndim);
  check_contiguous(op, what, t);
}

// Of x and out, [batch, d, h, w, channels] or [batch, channels, d, h, w].
inline ConvShape conv_shape(const char* op, const int64_t* x, const int64_t* out, int64_t groups,
                            const Axes& kernel, const Axes& stride, const Axes& padding,
                            const Axes& dilation, bool channels_last) {
  ConvShape s{};
  const int channel = channels_last ? 4 : 1, first_axis = channels_last ? 1 : 2;
  s.channels_last = channels_last;
  s.batch = x[0], s.in_channels = x[channel], s.out_channels = out[channel];
  s.groups = groups;
  GOSSAMER_CHECK(out[0] == s.batch, op, ": x has a batch of ", s.batch, ", out of ", out[0]);
  for (int axis = 0; axis < 3; ++axis) {
    s.in[axis] = x[first_axis + axis], s.out[axis] = out[first_axis + axis];
    s.kernel[axis] = kernel[axis], s.stride[axis] = stride[axis];
    s.padding[axis] = padding[axis], s.dilation[axis] = dilation[axis];
    check_size(op, "an extent of x", s.in[axis], 0);
    check_size(op, "an extent of out", s.out[axis], 0);
    check_size(op, "the kernel size", s.kernel[axis], 1);
    check_size(op, "the stride", s.stride[axis], 1);
    check_size(op, "the dilation", s.dilation[axis], 1);
    check_size(op, "the padding", s.padding[axis], 0);
  }
  check_size(op, "the kernel size", s.kernel[0] * s.kernel[1], 1);
  // So that numbers of pixels, and of what is made of them, stay within 64 bits.
  for (const int64_t* extents : {s.in, s.out}) {
    const double pixels = 1.0 * s.batch * extents[0] * extents[1] * extents[2];
    GOSSAMER_CHECK(pixels <= kMaxPixels, op, ": a batch of ", s.batch, " with ", extents[0], " x ",
                   extents[1], " x ", extents[2], " pixels, expected up to 2**40 in all");
  }
  check_size(op, "the number of groups", groups, 1);
  GOSSAMER_CHECK(s.in_channels % groups == 0, op, ": x has ", s.in_channels, " channels in ",
                 groups, " groups");
  return s;
}

}  // namespace gossamer
