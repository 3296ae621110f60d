// Convolution over voxels in groups, depthwise too, and the gradient of its weights, in exact sums
// of float32:
//
//   y[j, o] = act(b[o] + sum over taps t, over c < C_in / groups, of x[i(t, j), g C_in / groups +
//   c]
//             W[t, c, o]),   g the group of output o
//
// A group has few channels, of which tensor cores would multiply mostly padding. A thread sums four
// neighbouring outputs of a position, or of a weight, and neighbouring threads the next four, so
// that rows of x, y and weights are read in runs. Depthwise layers are bound by their reads: by
// arithmetic 115 MB of rows from the L2 for 900,000 pairs of 64 channels in bfloat16, 25 us.
//
// The weights' gradient takes segments of pairs as that of weight_grad.cu does, whose sums are
// added in their order; in a block several rows of threads share a segment's pairs, and their sums
// are added in the order of the rows.
#include "common/activation.cuh"
#include "common/ceil_div.h"
#include "common/check.h"
#include "common/ptx.cuh"
#include "common/run.cuh"
#include "pointcloud/conv_cuda.h"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 256, kRun = 4;

// The channels of a run of outputs, and the group of each.
struct Runs {
  int outputs, group_in;
  bool depthwise;  // output o has channel o, and no other
  unsigned across, rows;
  unsigned row;  // of the threads of a block
  int64_t lane;  // which run

  __device__ Runs(int64_t c_out, int64_t c_in, int64_t groups)
      : outputs(static_cast<int>(c_out / groups)), group_in(static_cast<int>(c_in / groups)) {
    depthwise = outputs == 1 && group_in == 1;
    const auto runs = static_cast<unsigned>((c_out + kRun - 1) / kRun);
    across = min(runs, static_cast<unsigned>(kThreads)), rows = kThreads / across;
    row = threadIdx.x / across;
    lane = int64_t{blockIdx.y} * across + (threadIdx.x - row * across);
  }
};

// The sums of four outputs, from `output` on, of which there are `count` or more.
struct Sums {
  float at[kRun] = {};

  template <class T>
  __device__ void add(const T* x, const T* weights, const Runs& runs, int64_t c_out,
                      const int (&channel)[kRun], int64_t count) {
    for (int c = 0; c < runs.group_in; ++c, weights += c_out) {
      const auto w = load_run<T, kRun>(weights, count);
      Run<T, kRun> features;
      if (runs.depthwise) {
        features = load_run<T, kRun>(x + channel[0], count);
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) features.at[i] = i < count ? x[channel[i] + c] : T{};
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        at[i] = fmaf(ptx::to_float(features.at[i]), ptx::to_float(w.at[i]), at[i]);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) conv_kernel(const CudaConvArgs args) {
  const OutputTable& table = args.table;
  const Runs runs(args.c_out, args.c_in, args.groups);
  const int64_t position = int64_t{blockIdx.x} * runs.rows + runs.row, output = runs.lane * kRun;
  const int64_t positions = table.groups * kGroupRows;
  if (runs.row >= runs.rows || position >= positions || output >= args.c_out) return;
  const int32_t to = table.rows[position];
  if (static_cast<unsigned>(to) >= static_cast<unsigned>(table.n_out)) return;
  const int64_t count = args.c_out - output, group = position / kGroupRows;
  int channel[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    channel[i] = static_cast<int>(output + i) / runs.outputs * runs.group_in;
  }

  Sums sums;
  const auto most = static_cast<int>(table.visits);
  const int end = min(table.begins[group + 1], most);
  const unsigned quarter = static_cast<unsigned>(position % kGroupRows) / kQuarterRows;
  for (int at = max(table.begins[group], 0); at < end; ++at) {
    const auto entry = static_cast<unsigned>(table.visited[at]);
    const unsigned tap = entry >> kQuarters;
    if ((entry >> quarter & 1) == 0 || tap >= table.taps) continue;
    const int32_t from = table.neighbours[tap * positions + position];
    if (static_cast<unsigned>(from) >= static_cast<unsigned>(table.n_in)) continue;
    sums.add(
        static_cast<const T*>(args.x) + from * args.x_stride,
        static_cast<const T*>(args.weights) + int64_t{tap} * runs.group_in * args.c_out + output,
        runs, args.c_out, channel, count);
  }
  Run<T, kRun> bias{}, y;
  if (args.bias != nullptr) {
    bias = load_run<T, kRun>(static_cast<const T*>(args.bias) + output, count);
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    y.at[i] = ptx::from_float<T>(activate(sums.at[i] + ptx::to_float(bias.at[i]), args.activation));
  }
  store_run(static_cast<T*>(args.y) + to * args.c_out + output, y, count);
}

struct Shared {
  SharedTile<float, kThreads * kRun> sums;
};

// A block for each segment and row of the group's channels, c.
template <class T>
__global__ void __launch_bounds__(kThreads) grad_kernel(const CudaWeightGradArgs args) {
  Shared& shared = *shared_memory<Shared>();
  const PairSegments& map = args.map;
  const Runs runs(args.c_out, args.c_in, args.groups);
  const int64_t segment = blockIdx.x, output = runs.lane * kRun, count = args.c_out - output;
  const int64_t end = min(map.begins[segment + 1], map.pairs);
  const bool mine = runs.row < runs.rows && count > 0;
  float sum[kRun] = {};
  int channel[kRun] = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) {
      channel[i] = static_cast<int>(output + i) / runs.outputs * runs.group_in +
                   static_cast<int>(blockIdx.z);
    }
  }
  for (int64_t at = max(map.begins[segment], int64_t{0}) + runs.row; mine && at < end;
       at += runs.rows) {
    const int32_t i = map.in[at], j = map.out[at];
    if (static_cast<unsigned>(i) >= static_cast<unsigned>(map.n_in) ||
        static_cast<unsigned>(j) >= static_cast<unsigned>(map.n_out)) {
      continue;
    }
    const T* x = static_cast<const T*>(args.x) + i * args.x_stride;
    const auto dy =
        load_run<T, kRun>(static_cast<const T*>(args.dy) + j * args.dy_stride + output, count);
    Run<T, kRun> features;
    if (runs.depthwise) {
      features = load_run<T, kRun>(x + output, count);
    } else {
#pragma unroll
      for (int c = 0; c < kRun; ++c) features.at[c] = c < count ? x[channel[c]] : T{};
    }
#pragma unroll
    for (int c = 0; c < kRun; ++c) {
      sum[c] = fmaf(ptx::to_float(features.at[c]), ptx::to_float(dy.at[c]), sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kRun; ++c) shared.sums[threadIdx.x * kRun + c] = sum[c];
  __syncthreads();
  if (runs.row != 0 || count <= 0) return;
  Run<float, kRun> total{};
  for (unsigned row = 0; row < runs.rows; ++row) {
#pragma unroll
    for (int c = 0; c < kRun; ++c) {
      total.at[c] += shared.sums[(row * runs.across + threadIdx.x) * kRun + c];
    }
  }
  const int64_t c_out = args.c_out;
  float* partial = args.partial + (segment * runs.group_in + blockIdx.z) * c_out;
  store_run(partial + output, total, count);
}

unsigned across_of(int64_t c_out) {
  const int64_t runs = ceil_div(c_out, kRun);
  return static_cast<unsigned>(runs < kThreads ? runs : kThreads);
}
unsigned columns_of(int64_t c_out) {
  return static_cast<unsigned>(ceil_div(ceil_div(c_out, kRun), across_of(c_out)));
}

template <class Call>
void for_type(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat16: return call(Float16{});
    case DType::kFloat32: return call(float{});
    default: fail("pointcloud: there is no kernel for groups of ", name(dtype));
  }
}

}  // namespace

void conv_grouped(const CudaConvArgs& args, cudaStream_t stream) {
  const int64_t rows = kThreads / across_of(args.c_out);
  const dim3 grid(static_cast<unsigned>(ceil_div(args.table.groups * kGroupRows, rows)),
                  columns_of(args.c_out));
  for_type(args.dtype, [&](auto type) {
    launch(conv_kernel<decltype(type)>, grid, kThreads, 0, stream, args);
  });
}

void sum_pairs_grouped(const CudaWeightGradArgs& args, cudaStream_t stream) {
  if (args.map.segments == 0) return;
  const dim3 grid(static_cast<unsigned>(args.map.segments), columns_of(args.c_out),
                  static_cast<unsigned>(args.c_in / args.groups));
  for_type(args.dtype, [&](auto type) {
    launch(grad_kernel<decltype(type)>, grid, kThreads, sizeof(Shared), stream, args);
  });
}

}  // namespace gossamer::pointcloud
