// Block-sparse convolution without tensor cores, every product and sum in float32 or float64:
//
//   y[o, n] = act(sum over live (tap, c) of x[at(o, tap), c] W[n, tap, c] + b[n] + residual[o, n])
//
// A thread block computes 64 pixels x 64 outputs, whole block rows in which each block takes a
// multiple of four rows. It visits the columns of the weight in which any of them has a live block,
// up to 32 channels at a time; cp.async brings them element by element, of any memory format and
// alignment, and turns them so that pixels and outputs lie side by side:
//
//   x [channel][64 pixels]   W [channel][64 outputs]      two stages: one is multiplied, one filled
//
// A thread sums 8 pixels x 4 outputs, which are in one block row, so that dead blocks are left out.
//
//   warp 0    outputs 0-3      lanes  0-7     pixels 4l to 4l + 3, and 32 + 4l to 35 + 4l
//             outputs 4-7      lanes  8-15
//             ...
#include "blocksparse/conv_cuda.h"
#include "blocksparse/conv_tile.cuh"
#include "common/activation.cuh"
#include "common/check.h"
#include "common/ptx.cuh"
#include "common/run.cuh"

namespace gossamer::blocksparse {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 2;
constexpr int kChannels = 32;       // of a stage
constexpr int kQuad = kFmaGranule;  // outputs of a thread, and half its pixels
constexpr int kLanes = 8;           // along the pixels
constexpr int kPitch = 64 + kQuad;  // so that neighbouring channels begin in different banks
static_assert(kFmaPixels == 2 * kQuad * kLanes && kFmaOutputs == kThreads / kLanes * kQuad);

template <class T>
struct Shared {
  SharedTile<T, kStages * kChannels * kPitch> x, w;
  SharedTile<Position, kFmaPixels> positions;
  SharedTile<int64_t, kFmaPixels> offsets;
};

template <class T>
struct Args {
  ConvLayout layout;
  unsigned groups;
  const T *x, *values, *bias, *residual;
  T* out;
  Activation activation;
};

template <class T>
__device__ __forceinline__ void copy_element(T* shared, const T* global, bool there) {
  if constexpr (sizeof(T) == 4) {
    ptx::cp_async4(shared, global, there ? 4 : 0);
  } else {
    ptx::cp_async8(shared, global, there ? 8 : 0);
  }
}

// What a stage holds.
struct Filled {
  int channels;
  uint32_t live;  // a bit for each four outputs
};

template <class T>
class Loader {
 public:
  __device__ Loader(const Args<T>& args, Shared<T>& shared, const OutputTile& tile)
      : args_(args),
        shared_(shared),
        group_(tile.group),
        columns_(args.layout, block_row_of_lane(args.layout, tile)) {}

  // Fills a stage with the next channels; of none after the last.
  __device__ Filled load(int stage) {
    if (channel_ >= channels_) {
      const int column = columns_.next(block_);
      live_ = __ballot_sync(kAllLanes, block_ >= 0);
      channel_ = 0;
      if (live_ != 0) at_.move_to(args_.layout, group_, column);
      channels_ = live_ == 0 ? 0 : at_.channels;
    }
    const Filled filled{min(channels_ - channel_, kChannels), live_};
    if (live_ != 0) {
      copy_x(shared_.x.data() + stage * kChannels * kPitch, filled.channels);
      copy_weights(shared_.w.data() + stage * kChannels * kPitch, filled.channels);
      channel_ += kChannels;
    }
    ptx::cp_async_commit();
    return filled;
  }

 private:
  __device__ static int64_t block_row_of_lane(const ConvLayout& layout, const OutputTile& tile) {
    return tile.block_row(layout, static_cast<int>(threadIdx.x) % kWarp * kQuad, kFmaOutputs);
  }

  // Calls body(row, channel) for 64 rows, neighbouring threads with neighbouring channels or rows.
  template <class Body>
  __device__ static void for_each(int channels, bool by_channel, const Body& body) {
    if (by_channel && channels > kChannels / 2) {
      for (int i = threadIdx.x; i < 64 * kChannels; i += kThreads) {
        body(i / kChannels, i % kChannels);
      }
    } else {
      for (int i = threadIdx.x; i < 64 * channels; i += kThreads) body(i % 64, i / 64);
    }
  }

  __device__ void copy_x(T* x, int channels) {
    const ConvLayout& layout = args_.layout;
    const int64_t channel_stride = layout.in_channel_stride();
    for_each(channels, layout.channels_last, [&](int row, int channel) {
      if (channel >= channels) return;
      const bool there = at_.sees(layout, shared_.positions.data()[row]);
      const int64_t from =
          shared_.offsets.data()[row] + at_.offset + (channel_ + channel) * channel_stride;
      // There are weights, and x may have no element to point at.
      copy_element(x + channel * kPitch + row, there ? args_.x + from : args_.values, there);
    });
  }

  __device__ void copy_weights(T* w, int channels) {
    const ConvLayout& layout = args_.layout;
    for_each(channels, true, [&](int row, int channel) {
      const int from = __shfl_sync(kAllLanes, block_, row / kQuad);
      const int within = row % layout.padded_rows;
      if (from < 0 || within >= layout.rows || channel >= channels) return;
      const int64_t offset =
          (int64_t{from} * layout.rows + within) * layout.cols + channel_ + channel;
      copy_element(w + channel * kPitch + row, args_.values + offset, true);
    });
  }

  const Args<T>& args_;
  Shared<T>& shared_;
  int group_;
  LiveColumns columns_;
  Column at_;
  int block_ = -1;  // of this lane, in the column
  int channel_ = 0, channels_ = 0;
  uint32_t live_ = 0;
};

template <class T>
__device__ __forceinline__ void multiply(T (&sum)[2 * kQuad][kQuad], const T* x, const T* w) {
  const auto& near = *reinterpret_cast<const Run<T, kQuad>*>(x);
  const auto& far = *reinterpret_cast<const Run<T, kQuad>*>(x + kFmaPixels / 2);
  const auto weights = *reinterpret_cast<const Run<T, kQuad>*>(w);
#pragma unroll
  for (int i = 0; i < 2 * kQuad; ++i) {
    const T pixel = i < kQuad ? near.at[i % kQuad] : far.at[i % kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) sum[i][j] += pixel * weights.at[j];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) conv_fma_kernel(const Args<T> args) {
  Shared<T>& shared = *shared_memory<Shared<T>>();
  const OutputTile tile(args.layout, args.groups, kFmaPixels, kFmaOutputs, blockIdx.x);
  for (int i = threadIdx.x; i < kFmaPixels; i += kThreads) {
    shared.positions[i] = position_of(args.layout, tile.first_pixel + i, shared.offsets.data() + i);
  }
  __syncthreads();

  const int quad = static_cast<int>(threadIdx.x) / kLanes;
  const int pixel = static_cast<int>(threadIdx.x) % kLanes * kQuad;
  Loader<T> loader(args, shared, tile);
  Filled filled = loader.load(0);
  T sum[2 * kQuad][kQuad] = {};
  for (int stage = 0; filled.live != 0; stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other any more
    const Filled next = loader.load(stage ^ 1);
    if (filled.live >> quad & 1) {
      const T* x = shared.x.data() + stage * kChannels * kPitch + pixel;
      const T* w = shared.w.data() + stage * kChannels * kPitch + quad * kQuad;
      for (int c = 0; c < filled.channels; ++c) multiply(sum, x + c * kPitch, w + c * kPitch);
    }
    filled = next;
  }
  ptx::cp_async_wait<0>();

  const auto run = tile.run(args.layout, quad * kQuad, kQuad, kFmaOutputs);
  T bias[kQuad];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    bias[j] = args.bias != nullptr && j < run.count ? args.bias[run.first + j] : T{};
  }
#pragma unroll
  for (int i = 0; i < 2 * kQuad; ++i) {
    const int64_t at = tile.first_pixel + i / kQuad * (kFmaPixels / 2) + pixel + i % kQuad;
    if (at >= args.layout.pixels) continue;
    const int64_t first = args.layout.out_offset(at) + run.first * args.layout.out_channel_stride();
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j >= run.count) continue;
      const int64_t place = first + j * args.layout.out_channel_stride();
      const T residual = args.residual == nullptr ? T{} : args.residual[place];
      args.out[place] = activate(sum[i][j] + bias[j] + residual, args.activation);
    }
  }
}

template <class T>
void launch_type(const CudaConvArgs& given, cudaStream_t stream) {
  const ConvArgs& conv = given.conv;
  const Weight& w = conv.weight;
  Args<T> args{};
  args.layout = layout_of(given);
  args.groups = static_cast<unsigned>(w.groups);
  args.x = static_cast<const T*>(conv.x);
  args.values = static_cast<const T*>(w.values);
  args.bias = static_cast<const T*>(conv.bias);
  args.residual = static_cast<const T*>(conv.residual);
  args.out = static_cast<T*>(conv.out);
  args.activation = conv.activation;
  launch(conv_fma_kernel<T>, grid_of(given), kThreads, sizeof(Shared<T>), stream, args);
}

}  // namespace

void conv_fma(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.conv.weight.dtype) {
    case DType::kFloat32: return launch_type<float>(args, stream);
    case DType::kFloat64: return launch_type<double>(args, stream);
    default: fail("blocksparse: there is no fma kernel for ", name(args.conv.weight.dtype));
  }
}

}  // namespace gossamer::blocksparse
