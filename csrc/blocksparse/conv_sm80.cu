// Block-sparse convolution of 16-bit floats by tensor cores:
//
//   y[o, n] = act(sum over live (tap, c) of x[at(o, tap), c] W[n, tap, c] + b[n] + residual[o, n])
//
// An implicit GEMM. A thread block computes a tile of consecutive pixels x block rows, each block
// lying in it as if it had 16, 32 or 64 rows and columns. It visits the columns of the weight in
// which any of its block rows has a live block, gathers the x that the column's tap sees, once for
// all of them, and those blocks of it that are live; products with the others are left out warp by
// warp, for 16 outputs at a time.
//
// How many outputs share an x is what decides. Of blocks of 32 x 32, a quarter of them live, 256
// pixels of x by one block row are 16 KB of x and 2 KB of weights for 2 x 256 x 32 x 32 operations,
// 28 a byte. Four block rows visit 68 % of the columns, not 25 %, but for 128 outputs: 40 a byte.
// Eight with 128 pixels visit 90 %: 46 a byte (of 16 x 16 blocks 43, where one block row has 15).
// An H200's tensor cores do about 60 operations (by mma, which reaches some 60 % of wgmma's) in the
// time in which the L2 delivers a byte.
//
//   a stage    64 channels: one column of 64, two of 32 or four of 16, of any taps
//   x, W       [pixel or output][8 pieces of 16 bytes], piece p of row r at p xor (r mod 8), so
//              that eight rows which ldmatrix reads at one p lie in different banks
//   A, B       of mma: A = x [16 pixels][16 channels], B = W [16 channels][8 outputs]
//
// One stage is multiplied while cp.async fills the others, two or more. Where channels do not lie
// side by side in x, or not at multiples of 16 bytes, the same places are filled element by element
// instead.
#include "blocksparse/conv_cuda.h"
#include "blocksparse/conv_tile.cuh"
#include "common/check.h"
#include "common/pieces.cuh"
#include "common/ptx.cuh"
#include "common/stored_run.cuh"

namespace gossamer::blocksparse {
namespace {

constexpr int kPieces = kStageChannels / 8;
constexpr int kQuarters = kStageChannels / kGranule;  // of a stage, the depth of an mma each
constexpr int kSumPadding = 4;                        // so that lanes write to different banks

template <int kTile>
struct Tile {
  static constexpr ConvTile kSizes = kConvTiles[kTile];
  static constexpr int kPixels = kSizes.pixels, kOutputs = kSizes.outputs;
  static constexpr int kStages = kSizes.stages;
  static constexpr int kThreads = kSizes.warps() * kWarp;
  static constexpr int kWarpPixels = kPixels / kSizes.warps_x;
  static constexpr int kWarpOutputs = kOutputs / kSizes.warps_w;
  static constexpr int kPixelTiles = kWarpPixels / 16;
  static constexpr int kGranules = kWarpOutputs / kGranule;
  static constexpr int kStagePieces = (kPixels + kOutputs) * kPieces;
  static constexpr int kSumStride = kWarpOutputs + kSumPadding;
  static constexpr int kWarpSums = kWarpPixels * kSumStride;
  static_assert(kSizes.warps() * kWarpSums * 4 <= kStages * kStagePieces * 16);
  static_assert(kOutputs / kGranule <= kWarp);  // a lane stands for each granule
};

template <int kTile>
struct Shared {
  using T = Tile<kTile>;
  SharedTile<uint4, T::kStages * T::kStagePieces, 128> stages;  // x, then W; at the end the sums
  SharedTile<Position, T::kPixels> positions;
  SharedTile<int64_t, T::kPixels> offsets;
  SharedTile<uint32_t, T::kStages * kQuarters> live;  // of each quarter, one bit a granule
};

struct Args {
  ConvLayout layout;
  unsigned groups;
  const uint16_t *x, *values;
  const void *bias, *residual;
  void* out;
  Activation activation;
  int log2_cols;            // as if blocks had that many columns
  bool x_pieces, w_pieces;  // whether they can be copied by 16 bytes
};

// ---- a stage into shared memory -----------------------------------------------------------------

// Threads by rows of 2, 4 or 8 pieces. Eight neighbouring threads write 128 bytes at once: rows are
// dealt out so that theirs differ in the bits that the pieces leave to them.
struct PieceOfThread {
  int piece, row, step;  // this thread's first row, and from one to the next

  __device__ PieceOfThread(int pieces, int threads) {
    const int thread = static_cast<int>(threadIdx.x), at = thread / pieces, together = 8 / pieces;
    piece = thread % pieces;
    row = at / 8 * 8 + at % together * pieces + at / together % pieces;
    step = threads / pieces;
  }
};

template <int kTile>
class Loader {
  using T = Tile<kTile>;

 public:
  __device__ Loader(const Args& args, Shared<kTile>& shared, const OutputTile& tile)
      : args_(args),
        shared_(shared),
        group_(tile.group),
        mine_((1 << args.log2_cols) / 8, T::kThreads),
        columns_(args.layout, block_row_of_lane(args, tile)) {}

  // Fills a stage; whether there was anything left.
  __device__ bool load(int stage) {
    uint4* x = shared_.stages.data() + stage * T::kStagePieces;
    uint32_t* live = shared_.live.data() + stage * kQuarters;
    const int pieces = (1 << args_.log2_cols) / 8;
    bool any = false;
    for (int first = 0; first < kPieces; first += pieces) {
      int block;
      const int column = columns_.next(block);
      const uint32_t mask = __ballot_sync(kAllLanes, block >= 0);
      if (static_cast<int>(threadIdx.x) < pieces / 2) live[first / 2 + threadIdx.x] = mask;
      if (mask == 0) continue;
      any = true;
      const bool other_tap = at_.move_to(args_.layout, group_, column);
      args_.x_pieces ? copy_x(x, first, other_tap) : gather_x(x, first);
      uint4* w = x + T::kPixels * kPieces;
      args_.w_pieces ? copy_weights(w, first, block) : gather_weights(w, first, block);
    }
    ptx::cp_async_commit();  // also an empty group: waits count groups
    return any;
  }

 private:
  __device__ static int64_t block_row_of_lane(const Args& args, const OutputTile& tile) {
    const int output = static_cast<int>(threadIdx.x) % kWarp * kGranule;
    return tile.block_row(args.layout, output, T::kOutputs);
  }

  __device__ void copy_x(uint4* x, int first, bool other_tap) {
    if (other_tap) {
      inside_ = 0;
      unsigned bit = 1;
      for (int row = mine_.row; row < T::kPixels; row += mine_.step, bit <<= 1) {
        if (at_.sees(args_.layout, shared_.positions.data()[row])) inside_ |= bit;
      }
    }
    const int bytes = bytes_of<2>(at_.channels, mine_.piece);
    const int64_t offset = at_.offset + 8 * mine_.piece;
    unsigned inside = bytes > 0 ? inside_ : 0;
#pragma unroll 4
    for (int row = mine_.row; row < T::kPixels; row += mine_.step, inside >>= 1) {
      const int64_t from = inside & 1 ? shared_.offsets.data()[row] + offset : 0;
      ptx::cp_async16(x + place_of<kPieces>(row, first + mine_.piece), args_.x + from,
                      inside & 1 ? bytes : 0);
    }
  }

  __device__ void copy_weights(uint4* w, int first, int block) {
    const int bytes = bytes_of<2>(at_.channels, mine_.piece);
    for (int row = mine_.row; row < T::kOutputs; row += mine_.step) {
      const int from = __shfl_sync(kAllLanes, block, row / kGranule);
      const int within = row & (args_.layout.padded_rows - 1);
      if (from < 0 || within >= args_.layout.rows) continue;
      const int64_t offset =
          (int64_t{from} * args_.layout.rows + within) * args_.layout.cols + 8 * mine_.piece;
      ptx::cp_async16(w + place_of<kPieces>(row, first + mine_.piece),
                      args_.values + (bytes > 0 ? offset : 0), bytes);
    }
  }

  __device__ static void put(uint4* stage, int row, int first, int channel, uint16_t value) {
    uint4* piece = stage + place_of<kPieces>(row, first + channel / 8);
    reinterpret_cast<uint16_t*>(piece)[channel % 8] = value;
  }

  // Neighbouring threads take neighbouring elements in memory: channels, or pixels.
  __device__ void gather_x(uint4* x, int first) {
    const ConvLayout& layout = args_.layout;
    const int cols = 1 << args_.log2_cols;
    const int64_t channel_stride = layout.in_channel_stride();
#pragma unroll 4
    for (int i = threadIdx.x; i < T::kPixels << args_.log2_cols; i += T::kThreads) {
      const int row = layout.channels_last ? i >> args_.log2_cols : i % T::kPixels;
      const int channel = layout.channels_last ? i & (cols - 1) : i / T::kPixels;
      const bool there = channel < at_.channels && at_.sees(layout, shared_.positions.data()[row]);
      const int64_t from = shared_.offsets.data()[row] + at_.offset + channel * channel_stride;
      put(x, row, first, channel, there ? args_.x[from] : uint16_t{0});
    }
  }

  __device__ void gather_weights(uint4* w, int first, int block) {
    const ConvLayout& layout = args_.layout;
    const int cols = 1 << args_.log2_cols;
    for (int i = threadIdx.x; i < T::kOutputs << args_.log2_cols; i += T::kThreads) {
      const int row = i >> args_.log2_cols, channel = i & (cols - 1);
      const int from = __shfl_sync(kAllLanes, block, row / kGranule);
      const int within = row & (layout.padded_rows - 1);
      if (from < 0 || within >= layout.rows) continue;
      const int64_t offset = (int64_t{from} * layout.rows + within) * layout.cols + channel;
      put(w, row, first, channel, channel < at_.channels ? args_.values[offset] : uint16_t{0});
    }
  }

  const Args& args_;
  Shared<kTile>& shared_;
  int group_;
  PieceOfThread mine_;
  LiveColumns columns_;
  Column at_;
  unsigned inside_ = 0;  // of which of this thread's pixels x has what the tap sees
};

// ---- the end of a sum ---------------------------------------------------------------------------

// Of output channel `output`, which lies at `at` of y.
template <class T>
__device__ __forceinline__ float finish(float sum, const Args& args, int64_t output, int64_t at) {
  if (args.bias != nullptr) sum += ptx::to_float(static_cast<const T*>(args.bias)[output]);
  if (args.residual != nullptr) sum += ptx::to_float(static_cast<const T*>(args.residual)[at]);
  return activate(sum, args.activation);
}

// Of a warp's pixels with their channels side by side: a lane takes runs of eight outputs.
template <class T, int kTile>
__device__ __forceinline__ void store_pixels(const Args& args, const OutputTile& tile,
                                             const float* sums, int64_t first_pixel,
                                             int first_output, int lane) {
  using Sizes = Tile<kTile>;
  constexpr int kRun = StoredRun<T>::kRun, kRuns = Sizes::kWarpOutputs / kRun;
  const int column = lane % kRuns * kRun;
  const auto there = tile.run(args.layout, first_output + column, kRun, Sizes::kOutputs);
  const StoredRun<T> run(there.first, there.count, args.bias, args.activation);
  if (run.count == 0) return;
#pragma unroll 1
  for (int row = lane / kRuns; row < Sizes::kWarpPixels; row += kWarp / kRuns) {
    if (first_pixel + row >= args.layout.pixels) return;
    const int64_t at = args.layout.out_offset(first_pixel + row);
    const T* residual =
        args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + at;
    run.store(static_cast<T*>(args.out) + at, sums + row * Sizes::kSumStride + column, residual);
  }
}

// Of a warp's outputs with their pixels side by side: a lane takes a pixel.
template <class T, int kTile>
__device__ __forceinline__ void store_outputs(const Args& args, const OutputTile& tile,
                                              const float* sums, int64_t first_pixel,
                                              int first_output, int lane) {
  using Sizes = Tile<kTile>;
#pragma unroll 1
  for (int row = lane; row < Sizes::kWarpPixels; row += kWarp) {
    if (first_pixel + row >= args.layout.pixels) return;
    const int64_t pixel = args.layout.out_offset(first_pixel + row);
#pragma unroll 1
    for (int column = 0; column < Sizes::kWarpOutputs; ++column) {
      const auto run = tile.run(args.layout, first_output + column, 1, Sizes::kOutputs);
      if (run.count == 0) continue;
      const float sum = sums[row * Sizes::kSumStride + column];
      const int64_t at = pixel + run.first * args.layout.out_pixels;
      static_cast<T*>(args.out)[at] = ptx::from_float<T>(finish<T>(sum, args, run.first, at));
    }
  }
}

// ---- the kernel ---------------------------------------------------------------------------------

// sum[i][2g], sum[i][2g + 1] += x of the warp's pixel tile i times the weights of its granule g,
// for one quarter of a stage.
template <class T, int kTile>
__device__ __forceinline__ void multiply_quarter(
    float (&sum)[Tile<kTile>::kPixelTiles][2 * Tile<kTile>::kGranules][4], const uint4* x,
    const uint4* w, uint32_t live, int quarter, int lane) {
  using Sizes = Tile<kTile>;
  // Lane 8m + r gives ldmatrix row r of matrix m. Of x those are pixels 0-7 and 8-15 of piece 0,
  // then of piece 1; of W both pieces of outputs 0-7, then of outputs 8-15.
  const int swizzled = lane % 8;
  const int x_at = (lane % 16) * kPieces + ((2 * quarter + lane / 16) ^ swizzled);
  const int w_at = (lane / 16 * 8 + lane % 8) * kPieces + ((2 * quarter + lane / 8 % 2) ^ swizzled);
  uint32_t a[Sizes::kPixelTiles][4];
#pragma unroll
  for (int i = 0; i < Sizes::kPixelTiles; ++i) ptx::ldmatrix(a[i], x + i * 16 * kPieces + x_at);
#pragma unroll
  for (int g = 0; g < Sizes::kGranules; ++g) {
    if ((live >> g & 1) == 0) continue;
    uint32_t b[4];
    ptx::ldmatrix(b, w + g * kGranule * kPieces + w_at);
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < Sizes::kPixelTiles; ++i) {
      ptx::mma_m16n8k16<T>(sum[i][2 * g], a[i], low);
      ptx::mma_m16n8k16<T>(sum[i][2 * g + 1], a[i], high);
    }
  }
}

template <class T, int kTile>
__global__ void __launch_bounds__(Tile<kTile>::kThreads, Tile<kTile>::kSizes.resident)
    conv_mma(const Args args) {
  using Sizes = Tile<kTile>;
  Shared<kTile>& shared = *shared_memory<Shared<kTile>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_x = warp % Sizes::kSizes.warps_x, warp_w = warp / Sizes::kSizes.warps_x;
  const OutputTile tile(args.layout, args.groups, Sizes::kPixels, Sizes::kOutputs, blockIdx.x);

  for (int i = threadIdx.x; i < Sizes::kPixels; i += Sizes::kThreads) {
    shared.positions[i] = position_of(args.layout, tile.first_pixel + i, shared.offsets.data() + i);
  }
  __syncthreads();

  Loader<kTile> loader(args, shared, tile);
  float sum[Sizes::kPixelTiles][2 * Sizes::kGranules][4] = {};
  int loaded = 0;             // stages with something in them, the same for all threads
  int stage = 0, filled = 0;  // the one to multiply, and the one to fill
#pragma unroll 1              // the first steps only fill: so the code that does it is there once
  for (int step = 1 - Sizes::kStages; step < loaded; ++step) {
    if (step >= 0) {
      ptx::cp_async_wait<Sizes::kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before it any more
    }
    loaded += loader.load(filled);
    filled = filled + 1 == Sizes::kStages ? 0 : filled + 1;
    if (step < 0) continue;

    const uint4* x = shared.stages.data() + stage * Sizes::kStagePieces;
    const uint4* w = x + (Sizes::kPixels + warp_w * Sizes::kWarpOutputs) * kPieces;
    x += warp_x * Sizes::kWarpPixels * kPieces;
    const uint32_t* live = shared.live.data() + stage * kQuarters;
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const uint32_t mine =
          live[quarter] >> (warp_w * Sizes::kGranules) & ((1u << Sizes::kGranules) - 1);
      if (mine != 0) multiply_quarter<T, kTile>(sum, x, w, mine, quarter, lane);
    }
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
  }

  // Through shared memory from fragments, in which a lane's outputs lie 8 apart, to rows of them;
  // each warp in a part of its own.
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared.stages.data()) + warp * Sizes::kWarpSums;
#pragma unroll
  for (int i = 0; i < Sizes::kPixelTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * Sizes::kGranules; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (16 * i + 8 * half + lane / 4) * Sizes::kSumStride + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(sums + at) =
            make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  const int64_t first_pixel = tile.first_pixel + warp_x * Sizes::kWarpPixels;
  const int first_output = warp_w * Sizes::kWarpOutputs;
  args.layout.channels_last
      ? store_pixels<T, kTile>(args, tile, sums, first_pixel, first_output, lane)
      : store_outputs<T, kTile>(args, tile, sums, first_pixel, first_output, lane);
}

// ---- launching ----------------------------------------------------------------------------------

template <class T, int kTile>
void launch_tile(const CudaConvArgs& given, cudaStream_t stream) {
  const ConvArgs& conv = given.conv;
  const Weight& w = conv.weight;
  const ConvShape& s = conv.shape;
  Args args{};
  args.layout = layout_of(given);
  args.groups = static_cast<unsigned>(w.groups);
  args.x = static_cast<const uint16_t*>(conv.x);
  args.values = static_cast<const uint16_t*>(w.values);
  args.bias = conv.bias;
  args.residual = conv.residual;
  args.out = conv.out;
  args.activation = conv.activation;
  while (1 << args.log2_cols < padded_size(w.cols)) ++args.log2_cols;
  const bool of_pieces = w.cols % 8 == 0;
  args.w_pieces = of_pieces && begins_at_16_bytes(w.values);
  // Without pixels in x there is nothing to point at.
  args.x_pieces = of_pieces && begins_at_16_bytes(conv.x) && s.channels_last &&
                  s.in_channels % 8 == 0 && w.group_in % 8 == 0 && s.batch * s.in_pixels() > 0;
  launch(conv_mma<T, kTile>, grid_of(given), Tile<kTile>::kThreads, sizeof(Shared<kTile>), stream,
         args);
}

template <class T>
void launch_type(const CudaConvArgs& args, cudaStream_t stream) {
  static_assert(kConvTileCount == 5);
  switch (args.config.tile) {
    case 0: return launch_tile<T, 0>(args, stream);
    case 1: return launch_tile<T, 1>(args, stream);
    case 2: return launch_tile<T, 2>(args, stream);
    case 3: return launch_tile<T, 3>(args, stream);
    case 4: return launch_tile<T, 4>(args, stream);
    default: fail("blocksparse: there is no tile ", args.config.tile);
  }
}

}  // namespace

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream) {
  switch (args.conv.weight.dtype) {
    case DType::kBFloat16: return launch_type<BFloat16>(args, stream);
    case DType::kFloat16: return launch_type<Float16>(args, stream);
    default: fail("blocksparse: there is no tensor-core kernel for ", name(args.conv.weight.dtype));
  }
}

}  // namespace gossamer::blocksparse
