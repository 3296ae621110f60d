#pragma once
// outer: of some pairs of a tap the outer products x[i]ᵀ dy[j], summed in registers.
//
//   x     [pair][channel]   gathered rows, a block of kBlock channels
//   dy    [pair][output]    gathered rows, a panel of up to kMostVectors registers of outputs
//   sums  [channel][output] a few channels of the panel in registers, while the pairs go by
//
// depthwise: a lane a channel.
#include "pointcloud/conv_kernels.h"
#include "pointcloud/weight_grad_slices.h"

namespace gossamer::pointcloud {
namespace {

template <class S, class T>
struct Outer {
  using F = typename S::F;
  using Out = Outputs<S, T>;
  using Rows = FloatWords<S, T>;
  static constexpr int kBlock = 64, kMostVectors = S::kLanes == 16 ? 4 : 2;
  static constexpr int kPanel = kMostVectors * S::kLanes;
  static constexpr int kChannels = 6;  // their sums and a panel fit the 32 or 16 registers
  static constexpr int kPairs = 32;    // their rows and the sums of a block fit L1
  static constexpr int64_t kLine = 64 / sizeof(T);

  template <int Vectors, int Channels>
  static void multiply(const float* x, const float* dy, int64_t pairs, float* sums,
                       int64_t sums_stride) {
    F sum[Channels][Vectors];
#pragma GCC unroll 6
    for (int c = 0; c < Channels; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[c][v] = S::load(sums + c * sums_stride + v * S::kLanes);
    }
    for (int64_t p = 0; p < pairs; ++p, x += kBlock, dy += kPanel) {
      F panel[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) panel[v] = S::load(dy + v * S::kLanes);
#pragma GCC unroll 6
      for (int c = 0; c < Channels; ++c) {
        const F channel = S::broadcast(x + c);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[c][v] = S::fma(panel[v], channel, sum[c][v]);
      }
    }
#pragma GCC unroll 6
    for (int c = 0; c < Channels; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) S::store(sums + c * sums_stride + v * S::kLanes, sum[c][v]);
    }
  }
  template <int Vectors, int Channels>
  static void multiply_up_to(int64_t channels, const float* x, const float* dy, int64_t pairs,
                             float* sums, int64_t sums_stride) {
    if (channels == Channels) return multiply<Vectors, Channels>(x, dy, pairs, sums, sums_stride);
    if constexpr (Channels > 1) {
      multiply_up_to<Vectors, Channels - 1>(channels, x, dy, pairs, sums, sums_stride);
    }
  }

  // A block of channels and a panel of outputs.
  struct Part {
    int64_t channel, channels, output, outputs;  // in the rows of x and dy
    float* sums;
    int64_t sums_stride;
  };

  template <int Vectors>
  static void run_part(const WeightGradArgs& args, const Slice& slice, const Part& part) {
    const KernelMap& map = args.map;
    const T* x = static_cast<const T*>(args.x);
    const T* dy = static_cast<const T*>(args.dy);
    const T* x_end = x + (map.n_in - 1) * args.x_stride + args.channels.in;
    const T* dy_end = dy + (map.n_out - 1) * args.dy_stride + args.channels.out;
    const int64_t blocks = (part.channels + kChannels - 1) / kChannels;
    for (int64_t first = slice.begin; first < slice.end; first += kPairs) {
      alignas(64) float x_rows[kPairs * kBlock], dy_rows[kPairs * kPanel];
      const int64_t pairs = slice.end - first < kPairs ? slice.end - first : kPairs;
      for (int64_t p = 0; p < pairs; ++p) {
        const T* x_row = x + map.in_row(map.in[first + p]) * args.x_stride + part.channel;
        const T* dy_row = dy + map.out_row(map.out[first + p]) * args.dy_stride + part.output;
        const int64_t later = first + kPairs + p;
        if (later < slice.end) {
          const T* x_later = x + map.in_row(map.in[later]) * args.x_stride + part.channel;
          const T* dy_later = dy + map.out_row(map.out[later]) * args.dy_stride + part.output;
          for (int64_t c = 0; c < part.channels; c += kLine) __builtin_prefetch(x_later + c);
          for (int64_t o = 0; o < part.outputs; o += kLine) __builtin_prefetch(dy_later + o);
        }
        Rows::gather(x_row, part.channels, x_end, x_rows + p * kBlock);
        Rows::gather(dy_row, part.outputs, dy_end, dy_rows + p * kPanel);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = part.channels * b / blocks, end = part.channels * (b + 1) / blocks;
        multiply_up_to<Vectors, kChannels>(end - begin, x_rows + begin, dy_rows, pairs,
                                           part.sums + begin * part.sums_stride, part.sums_stride);
      }
    }
  }
  template <int Vectors>
  static void run_part_of(int64_t vectors, const WeightGradArgs& args, const Slice& slice,
                          const Part& part) {
    if (vectors == Vectors) return run_part<Vectors>(args, slice, part);
    if constexpr (Vectors > 1) run_part_of<Vectors - 1>(vectors, args, slice, part);
  }

  static void run_slice(const WeightGradArgs& args, const Slice& slice, float* sums) {
    const Channels& channels = args.channels;
    const int64_t c_in = channels.group_in(), c_out = channels.group_out();
    const SumsRow row = Out::sums_row(channels);
    const int64_t vectors = Out::whole(c_out), panels = (vectors + kMostVectors - 1) / kMostVectors;
    for (int64_t g = 0; g < channels.groups; ++g) {
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = vectors * p / panels * S::kLanes;
        const int64_t last = vectors * (p + 1) / panels * S::kLanes;
        for (int64_t c = 0; c < c_in; c += kBlock) {
          const Part part = {g * c_in + c,
                             c_in - c < kBlock ? c_in - c : kBlock,
                             g * c_out + first,
                             (last < c_out ? last : c_out) - first,
                             sums + c * row.all + g * row.group + first,
                             row.all};
          run_part_of<kMostVectors>((last - first) / S::kLanes, args, slice, part);
        }
      }
    }
  }
  static void run(const WeightGradTask& task) {
    run_slices(task, Out::sums_row(task.args.channels), run_slice);
  }

  static constexpr WeightGradUnit unit = {.sums_row = Out::sums_row, .run = run};
};

template <class S, class T>
struct DepthwiseOuter {
  using Rows = FloatWords<S, T>;

  static void run_slice(const WeightGradArgs& args, const Slice& slice, float* sums) {
    const KernelMap& map = args.map;
    const int64_t channels = args.channels.out;
    const T* x = static_cast<const T*>(args.x);
    const T* dy = static_cast<const T*>(args.dy);
    const T* x_end = x + (map.n_in - 1) * args.x_stride + channels;
    const T* dy_end = dy + (map.n_out - 1) * args.dy_stride + channels;
    for (int64_t pair = slice.begin; pair < slice.end; ++pair) {
      const T* x_row = x + map.in_row(map.in[pair]) * args.x_stride;
      const T* dy_row = dy + map.out_row(map.out[pair]) * args.dy_stride;
      for (int64_t c = 0; c < channels; c += S::kLanes) {
        const int64_t count = channels - c < S::kLanes ? channels - c : S::kLanes;
        float x_part[S::kLanes], dy_part[S::kLanes];
        Rows::gather(x_row + c, count, x_end, x_part);
        Rows::gather(dy_row + c, count, dy_end, dy_part);
        const auto sum = S::load(sums + c);
        S::store(sums + c, S::fma(S::load(x_part), S::load(dy_part), sum));
      }
    }
  }
  static void run(const WeightGradTask& task) {
    run_slices(task, Depthwise<S, T>::sums_row(task.args.channels), run_slice);
  }

  static constexpr WeightGradUnit unit = {.sums_row = Depthwise<S, T>::sums_row, .run = run};
};

template <class S, class T>
const WeightGradUnit* weight_grad_of(const Channels& channels) {
  return channels.depthwise() ? &DepthwiseOuter<S, T>::unit : &Outer<S, T>::unit;
}

template <class S>
const WeightGradUnit* weight_grad_unit(DType dtype, const Channels& channels) {
  switch (dtype) {
    case DType::kFloat32: return weight_grad_of<S, float>(channels);
    case DType::kBFloat16: return weight_grad_of<S, BFloat16>(channels);
    case DType::kFloat16: return weight_grad_of<S, Float16>(channels);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::pointcloud
