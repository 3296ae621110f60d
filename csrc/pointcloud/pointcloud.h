#pragma once
// Convolution over the active voxels of a sparse grid, and the gradient of its weights:
//
//   y[j, o]     = act(b[o] + sum over pairs (i, j) of tap t, over c, of x[i, c] W[t, c, o])
//   dW[t, c, o] = sum over pairs (i, j) of tap t of x[i, c] dy[j, o]
//
// The kernel map names the pairs, tap by tap, by ranks in the sorted orders of the voxels. Within a
// tap both ranks ascend strictly, so a range of outputs has one slice of pairs a tap:
//
//   tap      0           1               2
//   in     | 0 2 3 5   | 0 1 2 3 4 5   | 1 4        outputs 2 and 3:
//   out    | 1 3 4 5   | 0 1 2 3 4 5   | 0 3          . # . .  . . # # . .  . #
//
// Rows of x, y and dy lie in the order of their owner, which in_order and out_order give by rank.
//
// The sum of an output runs over taps, then over channels, in one order; that of a weight over
// fixed segments of pairs. Neither depends on how the work is cut into tiles or over threads.
#include <cstdint>

#include "common/activation.h"
#include "common/choice.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::pointcloud {

struct KernelMap {
  int64_t taps, n_in, n_out;
  const int64_t* tap_offsets;           // [taps + 1]
  const int32_t *in, *out;              // [tap_offsets[taps]], ranks
  const int32_t *in_order, *out_order;  // rank -> row, or null where they are the same

  int64_t pairs() const { return tap_offsets[taps]; }
  int64_t in_row(int64_t rank) const { return in_order == nullptr ? rank : in_order[rank]; }
  int64_t out_row(int64_t rank) const { return out_order == nullptr ? rank : out_order[rank]; }
};

// Channels of a whole row; group g has the g-th of `groups` equal parts of both.
struct Channels {
  int64_t groups, in, out;

  int64_t group_in() const { return in / groups; }
  int64_t group_out() const { return out / groups; }
  bool depthwise() const { return groups == in && groups == out; }
  // Whether AMX is faster than float32 products, where tiles are not mostly padding (measured on
  // Emerald Rapids).
  bool fill_tiles() const { return group_in() * group_out() >= 512; }
};

struct ConvArgs {
  DType dtype;  // float32, bfloat16, float16, float64
  KernelMap map;
  Channels channels;
  const void* x;  // [n_in, channels.in], its rows x_stride elements apart
  int64_t x_stride;
  const void* weights;  // [taps, channels.group_in(), channels.out]
  const void* bias;     // [channels.out] or null
  Activation activation;
  void* y;  // [n_out, channels.out]
  int threads;
};

struct WeightGradArgs {
  DType dtype;
  KernelMap map;
  Channels channels;
  const void *dy, *x;  // [n_out, channels.out], [n_in, channels.in]
  int64_t dy_stride, x_stride;
  void* dw;  // [taps, channels.group_in(), channels.out]
  int threads;
};

void conv(const ConvArgs& args);
void conv_serial(const ConvArgs& args);  // the readable definition
void weight_grad(const WeightGradArgs& args);
void weight_grad_serial(const WeightGradArgs& args);

// The kernel that the target in force has for a dtype and channels, and whose it is.
Choice choose_conv(DType dtype, const Channels& channels);

void bind_conv(pybind11::module_& m);
void bind_conv_cuda(pybind11::module_& m);
void bind_layout_cuda(pybind11::module_& m);

}  // namespace gossamer::pointcloud
