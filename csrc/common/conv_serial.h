#pragma once
// What the readable definitions of convolutions share: the walk over the pixels of y.
#include <vector>

#include "common/conv_shape.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace gossamer {

// The channels of x under one tap of an output, or null where the tap is in the padding.
template <class T>
const T* x_at(const ConvShape& s, const T* x, int64_t image, const int64_t (&out)[3], int64_t tap) {
  const int64_t t[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1],
                        tap % s.kernel[2]};
  int64_t pixel = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t at = out[axis] * s.stride[axis] + t[axis] * s.dilation[axis] - s.padding[axis];
    if (at < 0 || at >= s.in[axis]) return nullptr;
    pixel = pixel * s.in[axis] + at;
  }
  return x + image * s.in_pixels() * s.in_channels + pixel * s.in_pixel_stride();
}

// Calls body(taps_of_x, out) for the pixels [begin, end) of all images of y: with x_at of each tap,
// and the pixel's channel 0.
template <class T, class Body>
void for_each_pixel(const ConvShape& s, const void* x, void* out, int64_t begin, int64_t end,
                    const Body& body) {
  std::vector<const T*> taps_of_x(s.taps());
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t image = pixel / s.out_pixels(), within = pixel % s.out_pixels();
    const int64_t at[3] = {within / (s.out[1] * s.out[2]), within / s.out[2] % s.out[1],
                           within % s.out[2]};
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      taps_of_x[tap] = x_at(s, static_cast<const T*>(x), image, at, tap);
    }
    body(taps_of_x.data(), static_cast<T*>(out) + image * s.out_pixels() * s.out_channels +
                               within * s.out_pixel_stride());
  }
}

// Calls body(T{}, begin, end) with the dtype's T for ranges of the pixels of all images.
template <class Body>
void for_pixel_ranges(DType dtype, const ConvShape& s, int threads, const Body& body) {
  parallel_ranges(threads, s.batch * s.out_pixels(), [&](int64_t begin, int64_t end) {
    visit_floats(dtype, [&]<class T>(T t) { body(t, begin, end); });
  });
}

}  // namespace gossamer
