#pragma once
// Convolutions with a 2:4 weight:
//
//   y[o, n] = act(sum_{tap, c} x[at(o, tap), c] * W[n, tap, c] + b[n]),   common/conv_shape.h
//
// W is the 2:4 matrix (sparse24.h) [C_out, taps * P]: of every tap (kd, kh, kw order) the channels
// of a group of the convolution, padded to P = 4 * ceil(C_in / groups / 4) columns. A column of
// padding holds 0 and meets no x. Whether a weight that is not finite meets the zeros around x, or
// its tap is left out there, is up to a kernel; that a number of x which is not finite reaches no
// output but through a stored position is not. Indices that validate() would refuse never lead
// outside memory.
#include "common/conv_shape.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

struct ConvArgs {
  Weight weight;  // n = C_out, k = taps * P; its panels are pairs (conv_pairs.h), checked
  ConvShape shape;
  const void* x;     // in the weight's dtype
  const void* bias;  // [C_out] or null
  Activation activation;
  void* out;
  int threads;
  const void* residual = nullptr;  // as out, or none
};

inline int64_t padded_channels(const ConvShape& s) { return (s.group_in() + 3) / 4 * 4; }

void conv(const ConvArgs& args);         // chooses target and kernel
void conv_serial(const ConvArgs& args);  // the definition; float64 has no other

void bind_conv(pybind11::module_& m);
void bind_conv_cuda(pybind11::module_& m);

}  // namespace gossamer::sparse24
