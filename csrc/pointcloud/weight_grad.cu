// The gradient of a convolution's weights over voxels:
//
//   dW[t, c, o] = sum over pairs (i, j) of tap t of x[i, c] dy[j, o]
//
// In two passes, so that the order of a sum is that of the pairs whatever runs beside it: a thread
// block sums 64 channels x 64 outputs over one segment of a tap's pairs, and then the sums of a
// tap's segments are added one after the other.
//
//   a stage    32 pairs: x [pair][64 channels], dy [pair][64 outputs], in pieces of 16 bytes
//   A, B       of mma, for 16-bit floats: A = xᵀ [16 channels][16 pairs], B = dy [16 pairs][8
//              outputs], both turned by ldmatrix
//
// float32 is multiplied without tensor cores, 8 channels x 4 outputs a thread.
#include "common/check.h"
#include "common/run.cuh"
#include "common/warp_tile.cuh"
#include "pointcloud/conv_cuda.h"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 128, kStages = 4;
constexpr int kPairs = 32;     // of a stage
constexpr int kChannels = 64;  // of x and of dy, that a block takes

template <class T>  // as storage
struct Stage {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kRow = kChannels / kEach;  // pieces
  static constexpr int kX = kPairs * kRow, kPieces = 2 * kX;
  static constexpr int kMine = kX / kThreads;
  static_assert(kX % kThreads == 0);
};

template <class T>
struct Shared {
  SharedTile<uint4, kStages * Stage<T>::kPieces, 128> stages;
};

template <class T>
struct Args {
  PairSegments map;
  int c_in, c_out;
  const T *dy, *x;
  int64_t dy_stride, x_stride;
  float* partial;
  bool dy_pieces, x_pieces;  // whether they can be copied by 16 bytes
};

// What a thread block sums.
struct Part {
  int64_t segment, begin, end;  // its pairs
  int channel, output;          // the first ones

  template <class T>
  __device__ explicit Part(const Args<T>& args) {
    const auto columns = static_cast<unsigned>(args.c_out + kChannels - 1) / kChannels;
    const auto rows = static_cast<unsigned>(args.c_in + kChannels - 1) / kChannels;
    const unsigned tile = blockIdx.x / columns;
    output = static_cast<int>(blockIdx.x - tile * columns) * kChannels;
    segment = tile / rows;
    channel = static_cast<int>(tile % rows) * kChannels;
    begin = max(args.map.begins[segment], int64_t{0});
    end = min(args.map.begins[segment + 1], args.map.pairs);
  }
};

// ---- a stage into shared memory -----------------------------------------------------------------

template <class T>
class Loader {
  using S = Stage<T>;

 public:
  __device__ Loader(const Args<T>& args, Shared<T>& shared, const Part& part)
      : args_(args), stages_(shared.stages.data()), part_(part), pair_(part.begin) {
    ask();
  }

  // Fills a stage with the pairs that follow, with zeros after the last.
  __device__ void load(int stage) {
    if (pair_ < part_.end) {
      int in[S::kMine], out[S::kMine];
#pragma unroll
      for (int i = 0; i < S::kMine; ++i) in[i] = in_[i], out[i] = out_[i];
      pair_ += kPairs;
      ask();
      uint4* x = stages_ + stage * S::kPieces;
      fill_rows(x, args_.x, args_.x_stride, in, args_.map.n_in, args_.c_in - part_.channel,
                part_.channel, args_.x_pieces);
      fill_rows(x + S::kX, args_.dy, args_.dy_stride, out, args_.map.n_out,
                args_.c_out - part_.output, part_.output, args_.dy_pieces);
    }
    ptx::cp_async_commit();  // also an empty group: waits count groups
  }

 private:
  static __device__ int my_row(int i) {
    return static_cast<int>(threadIdx.x) / S::kRow + i * (kThreads / S::kRow);
  }

  // For the rows that this thread copies for the stage that follows.
  __device__ void ask() {
#pragma unroll
    for (int i = 0; i < S::kMine; ++i) {
      const int64_t pair = pair_ + my_row(i);
      const bool there = pair < part_.end;
      in_[i] = there ? args_.map.in[pair] : -1;
      out_[i] = there ? args_.map.out[pair] : -1;
    }
  }

  __device__ void fill_rows(uint4* to, const T* data, int64_t stride, const int (&rows)[S::kMine],
                            int64_t count, int channels, int first, bool in_pieces) const {
    const int piece = static_cast<int>(threadIdx.x) % S::kRow;
    const int bytes = bytes_of<sizeof(T)>(channels, piece);
    const T* from = data + first + S::kEach * piece;
#pragma unroll
    for (int i = 0; i < S::kMine; ++i) {
      const bool there = bytes > 0 && static_cast<unsigned>(rows[i]) < static_cast<unsigned>(count);
      fill(to + place_of<S::kRow>(my_row(i), piece), there ? from + rows[i] * stride : data,
           there ? bytes : 0, in_pieces);
    }
  }

  const Args<T>& args_;
  uint4* stages_;
  const Part& part_;
  int64_t pair_;
  int in_[S::kMine], out_[S::kMine];
};

// ---- products -----------------------------------------------------------------------------------

// Of a warp: 32 channels x 32 outputs.
template <class T>
struct MmaSums {
  static constexpr int kC = 2, kO = 4;  // tiles of mma
  using Turned = Lines<Stage<uint16_t>::kRow, true>;
  WarpTile<T, kC, kO> tile;

  __device__ void add(const uint4* x, const uint4* dy) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile.template multiply_half<Turned, Turned>(x, first_channel(), dy, first_output(), half,
                                                  lane);
    }
  }

  template <class Store>
  __device__ void each(const Store& store) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kC; ++i) {
#pragma unroll
      for (int j = 0; j < kO; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Run<float, 2> two{{tile.sum[i][j][2 * half], tile.sum[i][j][2 * half + 1]}};
          store(first_channel() + 16 * i + 8 * half + lane / 4,
                first_output() + 8 * j + lane % 4 * 2, two);
        }
      }
    }
  }

 private:
  static __device__ int first_channel() { return static_cast<int>(threadIdx.x) / kWarp % 2 * 32; }
  static __device__ int first_output() { return static_cast<int>(threadIdx.x) / kWarp / 2 * 32; }
};

// Of a thread: channels 4l to 4l + 3 and 32 + 4l to 35 + 4l x 4 outputs, l its lane of eight.
struct FmaSums {
  using Four = Run<float, 4>;
  float sum[8][4] = {};

  __device__ void add(const uint4* x, const uint4* dy) {
    constexpr int kRow = Stage<float>::kRow;
#pragma unroll 4
    for (int pair = 0; pair < kPairs; ++pair) {
      const auto near = *reinterpret_cast<const Four*>(x + place_of<kRow>(pair, lane()));
      const auto far = *reinterpret_cast<const Four*>(x + place_of<kRow>(pair, lane() + 8));
      const auto outputs = *reinterpret_cast<const Four*>(dy + place_of<kRow>(pair, quad()));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float channel = i < 4 ? near.at[i % 4] : far.at[i % 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += channel * outputs.at[j];
      }
    }
  }

  template <class Store>
  __device__ void each(const Store& store) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Four four{{sum[i][0], sum[i][1], sum[i][2], sum[i][3]}};
      store(i / 4 * 32 + 4 * lane() + i % 4, 4 * quad(), four);
    }
  }

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 8; }
  static __device__ int quad() { return static_cast<int>(threadIdx.x) / 8; }
};

// ---- the kernels --------------------------------------------------------------------------------

template <class T, class Sums>  // T as storage
__global__ void __launch_bounds__(kThreads) sum_pairs(const Args<T> args) {
  using S = Stage<T>;
  Shared<T>& shared = *shared_memory<Shared<T>>();
  const Part part(args);
  Loader<T> loader(args, shared, part);
  Sums sums;
  const int64_t steps = (part.end - part.begin + kPairs - 1) / kPairs;
  int stage = 0, filled = 0;  // the one to multiply, and the one to fill
#pragma unroll 1              // the first steps only fill: so the code that does it is there once
  for (int64_t step = 1 - kStages; step < steps; ++step) {
    if (step >= 0) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before it any more
    }
    loader.load(filled);
    filled = filled + 1 == kStages ? 0 : filled + 1;
    if (step < 0) continue;
    const uint4* x = shared.stages.data() + stage * S::kPieces;
    sums.add(x, x + S::kX);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();

  float* partial = args.partial + part.segment * args.c_in * args.c_out;
  sums.each([&](int channel, int output, const auto& run) {
    channel += part.channel, output += part.output;
    if (channel >= args.c_in || output >= args.c_out) return;
    store_run(partial + int64_t{channel} * args.c_out + output, run, args.c_out - output);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_segments(const float* partial, const int64_t* of_tap, int64_t segments, int64_t each,
                 T* dw) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= each) return;
  const int64_t end = min(of_tap[blockIdx.y + 1], segments);
  float sum = 0;
  for (int64_t s = max(of_tap[blockIdx.y], int64_t{0}); s < end; ++s) sum += partial[s * each + at];
  dw[blockIdx.y * each + at] = ptx::from_float<T>(sum);
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, class Storage, class Sums>
void launch_type(const CudaWeightGradArgs& given, cudaStream_t stream) {
  const PairSegments& map = given.map;
  Args<Storage> args{};
  args.map = map;
  args.c_in = static_cast<int>(given.c_in), args.c_out = static_cast<int>(given.c_out);
  args.dy = static_cast<const Storage*>(given.dy), args.x = static_cast<const Storage*>(given.x);
  args.dy_stride = given.dy_stride, args.x_stride = given.x_stride;
  args.partial = given.partial;
  args.dy_pieces = in_pieces<Storage>(args.dy, args.dy_stride, given.c_out);
  args.x_pieces = in_pieces<Storage>(args.x, args.x_stride, given.c_in);
  const int64_t tiles = ceil_div(given.c_in, kChannels) * ceil_div(given.c_out, kChannels);
  if (given.groups > 1) {
    sum_pairs_grouped(given, stream);
  } else if (map.segments > 0) {
    launch(sum_pairs<Storage, Sums>, static_cast<unsigned>(map.segments * tiles), kThreads,
           sizeof(Shared<Storage>), stream, args);
  }
  const int64_t each = given.c_in / given.groups * given.c_out;
  const dim3 grid(static_cast<unsigned>(ceil_div(each, kThreads)), static_cast<unsigned>(map.taps));
  launch(add_segments<T>, grid, kThreads, 0, stream, given.partial, map.of_tap, map.segments, each,
         static_cast<T*>(given.dw));
}

}  // namespace

void weight_grad_cuda(const CudaWeightGradArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16: return launch_type<BFloat16, uint16_t, MmaSums<BFloat16>>(args, stream);
    case DType::kFloat16: return launch_type<Float16, uint16_t, MmaSums<Float16>>(args, stream);
    case DType::kFloat32: return launch_type<float, float, FmaSums>(args, stream);
    default: fail("pointcloud: there is no kernel for gradients of ", name(args.dtype));
  }
}

}  // namespace gossamer::pointcloud
