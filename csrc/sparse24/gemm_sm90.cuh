#pragma once
// 2:4 GEMM on Hopper for many rows of x:
//
//   out[m, n] = act(x_scales[m] row_scales[n] sum over k of x[m, k] W[n, k]  +  bias[n])
//
// W, in Fragments (cuda.h), is the sparse left operand of wgmma.sp and x its right one, so a block
// computes the transpose of a tile of `out`: kRows rows of W by kTokens rows of x.
//
//                              kTokens rows of x (tokens)
//                            +---------------------------+
//   warpgroup 0, slices 0..  |  64 rows of W a slice,    |     warpgroup 2, the producer: one
//                            |  16 of them a warp        |     thread fills a ring of kStages
//                            +---------------------------+     tiles of x by TMA, kTokens rows
//   warpgroup 1, slices 0..  |                           |     of 128 bytes (a step)
//                            +---------------------------+
//
// wgmma.sp takes 128 bytes of x a cycle at its full rate, all that an SM reads from shared memory,
// whatever kTokens is. So all else has to stay out of its way, and out of the way to the L2:
//
//   - W never goes there. Fragments holds the operand registers as they are, so a warp loads those
//     of its 16 rows by 16 bytes a lane, ahead of their use.
//   - Each tile of x serves all rows of the block. By arithmetic, not measured, these are the bytes
//     a cycle at the full rate (of W for 16-bit types; 8-bit ones have 10/9 of it), and the share
//     of it that is left if shared memory counts reads and writes alike:
//
//       kRows x kTokens   x, written   W    from the L2   share
//          128 x 256          64       18       82         2/3
//          256 x 128          32       36       68         4/5    as many accumulators
//          128 x 128          64       36      100         2/3    for few tiles
//
//     That is more than the L2 has. NVIDIA states 5120 bytes a cycle for an A100's and nothing for
//     an H100's; if that is as wide, 132 multiprocessors get 39 each, so that the tiles reach at
//     most 48, 57 and 39 percent of the full rate: a tile is chosen by what it reads. To read less,
//     blocks with the same rows of x would have to share them, by multicast in a cluster.
//
// A grid is persistent: a block goes from tile to tile, and while the result of one is stored, its
// producer fills the ring for the next and its consumers have the first weights on the way.
#include <algorithm>
#include <cstdint>

#include "common/activation.cuh"
#include "common/check.h"
#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "sparse24/gemm_cuda.h"

namespace gossamer::sparse24 {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups: one multiplies while the other waits or stores
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
// A multiprocessor has 512 registers for every four warps, one in each warpgroup: 2 x 240 + 24.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

constexpr int kSliceRows = 64;   // of W: the M of wgmma
constexpr int kStepBytes = 128;  // of a row of x: the widest swizzle
constexpr int kEightRows = 8 * kStepBytes;
constexpr int kRingBytes = 160 << 10;  // with 64 KiB for the result, what a block may have

// The weights of a record, in uint4: for each step the fragments of two products, a uint4 a lane;
// then the metadata.
template <class T>
struct Record {
  static constexpr int kStepColumns = kStepBytes / sizeof(T);
  static constexpr int kSteps = kFragmentColumns / kStepColumns;
  static constexpr int kMetadata = 2 * kSteps * 32;
  static constexpr int kSize = kMetadata + 32;
};

template <int kTokens>
constexpr int kStages = kRingBytes / (kTokens * kStepBytes);

// 16-bit results go to `out` through shared memory, in tiles of [token][row of W] with the swizzle
// that TMA undoes.
template <class Out>
constexpr bool kStaged = sizeof(Out) == 2;

template <class T, class Out, int kSlices, int kTokens>
struct Shared {
  SharedTile<T, kTokens * kStepBytes / sizeof(T), 1024> x[kStages<kTokens>];
  SharedTile<Out, kStaged<Out> ? kTokens * kSliceRows : 1, 1024> result[kConsumers][kSlices];
  uint64_t full[kStages<kTokens>];   // the bytes of x that arrive
  uint64_t empty[kStages<kTokens>];  // the consumers' warps that have let go
};

struct Args {
  TensorMap x, out;
  bool out_by_tma;
  int64_t n;
  int m, records, weight_tiles;  // weight_tiles: of 16 rows
  int steps, last_steps;         // of a tile, and of its last record
  int tiles_m, tiles_n;
  const uint4* weights;
  const void* bias;
  const float *x_scales, *row_scales;
  void* result;
  Activation activation;
};

// ---- the order of tiles and of stages -----------------------------------------------------------

// Blocks work on consecutive tiles at the same time, so these form a patch of the output: kGroup
// tiles of x by as many of W as it takes. Of 132 tiles, 8 x 16 share their operands best in the L2.
struct Position {
  static constexpr int kGroup = 8;
  int tile_m, tile_n;
  __device__ Position(const Args& args, int tile) {
    const int group = tile / (kGroup * args.tiles_n), inside = tile % (kGroup * args.tiles_n);
    const int width = min(kGroup, args.tiles_m - group * kGroup);
    tile_m = group * kGroup + inside % width;
    tile_n = inside / width;
  }
};

template <int kSize>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage < kSize) return;
    stage = 0;
    phase ^= 1;
  }
};

// ---- the producer -------------------------------------------------------------------------------

template <class T, class Out, int kSlices, int kTokens>
__device__ void produce(Shared<T, Out, kSlices, kTokens>& shared, const Args& args) {
  Ring<kStages<kTokens>> ring;
  for (int tile = blockIdx.x; tile < args.tiles_m * args.tiles_n; tile += gridDim.x) {
    const Position at(args, tile);
    for (int step = 0; step < args.steps; ++step, ring.advance()) {
      // The first round finds the stages empty: the phase before the first counts as ended.
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      // Of a tile past the edges of x, too, all bytes arrive; those outside are zeros.
      ptx::mbarrier_arrive_expect_tx(full, kTokens * kStepBytes);
      ptx::tma_load_2d(shared.x[ring.stage].data(), &args.x, full, step * Record<T>::kStepColumns,
                       at.tile_m * kTokens);
    }
  }
}

// ---- a consumer's weights -----------------------------------------------------------------------

// This lane's part of the current record of each slice. Rows past N take the last tile of 16: what
// they multiply is not stored, but their metadata have to be legal.
template <class T, int kSlices>
struct Records {
  const uint4* at[kSlices];
  __device__ Records(const Args& args, int tile_n) {
    const int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int slice = (tile_n * kConsumers + warpgroup) * kSlices + i;
      const int tile = min(slice * (kSliceRows / kFragmentRows) + warp, args.weight_tiles - 1);
      at[i] = args.weights + int64_t{tile} * args.records * Record<T>::kSize + threadIdx.x % 32;
    }
  }
  __device__ Records next() const {
    Records after = *this;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) after.at[i] += Record<T>::kSize;
    return after;
  }
};

// The operands of kSlots steps. wgmma reads its registers some time after it was issued, so a slot
// is refilled, for the step kSlots later, only when its products are known to be done.
template <class T, int kSlices>
struct Weights {
  static constexpr int kSteps = Record<T>::kSteps;
  // A whole record where the registers suffice, so that a load has the time of three steps.
  static constexpr int kSlots = kSlices == 1 ? kSteps : 2;
  uint32_t values[kSlots][kSlices][2][4];
  // Of two records in turn. (They have names of their own because ptxas runs the products one by
  // one where a register that wgmma reads is copied from another.)
  uint4 metadata[2][kSlices];

  // `step` counts from the beginning of the record `from`, and may lie in the one after it.
  __device__ void load_step(int step, const Records<T, kSlices>& from,
                            const Records<T, kSlices>& following) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const uint4* at = step < kSteps ? from.at[i] : following.at[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 v = ptx::load16(at + (2 * (step % kSteps) + half) * 32);
        uint32_t (&to)[4] = values[step % kSlots][i][half];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  }
  __device__ void load_metadata(int parity, const Records<T, kSlices>& from) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      metadata[parity][i] = ptx::load16(from.at[i] + Record<T>::kMetadata);
    }
  }
  __device__ uint32_t word(int parity, int slice, int step, int half) const {
    const uint4& v = metadata[parity][slice];
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
    return words[sizeof(T) == 2 ? step : 2 * step + half];
  }
};

// ---- a consumer's result ------------------------------------------------------------------------

template <class T>
constexpr bool kScaled = sizeof(T) == 1;

// What a lane of a slice has of `out`. Its register 4j + i: row 16 warp + g + 8 (i / 2) of W, token
// 8j + 2t + i mod 2.
template <class T, class Out, int kTokens>
struct Result {
  using Sum = ptx::Accumulator<T>;
  const Args& args;
  int64_t first_n;  // of this warp's 16 rows
  int first_m;      // of the tile
  float row_scale[2], bias[2];

  __device__ Result(const Args& args_, int64_t first_n_, int first_m_)
      : args(args_), first_n(first_n_), first_m(first_m_) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first_n + threadIdx.x % 32 / 4 + 8 * half;
      const bool scaled = kScaled<T> && args.row_scales != nullptr && n < args.n;
      row_scale[half] = scaled ? args.row_scales[n] : 1.0f;
      const bool biased = args.bias != nullptr && n < args.n;
      bias[half] = biased ? ptx::to_float(static_cast<const Out*>(args.bias)[n]) : 0.0f;
    }
  }
  template <Activation kActivation>
  __device__ float finish(Sum sum, int token, int half) const {
    float y = static_cast<float>(sum);
    if constexpr (kScaled<T>) {
      const int m = first_m + token;
      y *= args.x_scales != nullptr && m < args.m ? args.x_scales[m] : 1.0f;
      y *= row_scale[half];
    }
    return activate(y + bias[half], kActivation);
  }

  // float32, straight to `out`: eight lanes write the 32 bytes of a sector.
  template <Activation kActivation>
  __device__ void store(const Sum (&sum)[kTokens / 2]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Out* out = static_cast<Out*>(args.result) + first_m * args.n + first_n + g;
#pragma unroll
    for (int first = 0; first < kTokens; first += 8) {
      if (first_m + first >= args.m) break;  // as in stage()
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + 2 * t + i % 2, half = i / 2;
        if (first_m + token < args.m && first_n + g + 8 * half < args.n) {
          out[token * args.n + 8 * half] = finish<kActivation>(sum[first / 2 + i], token, half);
        }
      }
    }
  }

  // 16-bit types, to rows of 64 in shared memory, a token each, whose eight chunks of 16 bytes are
  // swizzled by the token: four transposed 8 x 8 matrices a store, [2 x 8 tokens][2 x 8 rows].
  template <Activation kActivation>
  __device__ void stage(const Sum (&sum)[kTokens / 2], Out* tile) const {
    const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32 % 4;
    const int chunk = 2 * warp + lane / 8 % 2, row = lane / 16 * 8 + lane % 8;
    Out* to = tile + row * kSliceRows + (chunk ^ lane % 8) * 8;
#pragma unroll
    for (int token = 0; token < kTokens; token += 16) {
      // Past the last token nothing is read. (It also keeps ptxas from computing all activations
      // side by side, for which there are no registers.)
      if (first_m + token >= args.m) break;
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = token + i / 2 * 8, half = i % 2, at = first / 2 + 2 * half;
        matrices[i] = ptx::pack<Out>(finish<kActivation>(sum[at], first + 2 * t, half),
                                     finish<kActivation>(sum[at + 1], first + 2 * t + 1, half));
      }
      ptx::stmatrix_trans(to + token * kSliceRows, matrices);
    }
  }
};

// Rows of `out` that TMA cannot address: a warp writes the 64 elements of a token.
template <class Out, int kTokens>
__device__ void copy_out(const Args& args, const Out* tile, int64_t first_n, int first_m) {
  Out* out = static_cast<Out*>(args.result) + first_m * args.n + first_n;
  for (int token = threadIdx.x / 32 % 4; token < min(kTokens, args.m - first_m); token += 4) {
#pragma unroll
    for (int row = threadIdx.x % 32; row < kSliceRows; row += 32) {
      if (first_n + row >= args.n) continue;
      out[token * args.n + row] = tile[token * kSliceRows + (row / 8 ^ token % 8) * 8 + row % 8];
    }
  }
}

template <class T, class Out, int kSlices, int kTokens>
__device__ void finish_tile(const ptx::Accumulator<T> (&sum)[kSlices][kTokens / 2],
                            Shared<T, Out, kSlices, kTokens>& shared, const Args& args,
                            const Position& at) {
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int first_m = at.tile_m * kTokens;
  const int64_t first_n = (int64_t{at.tile_n} * kConsumers + warpgroup) * kSlices * kSliceRows;
  const auto whole_warpgroup = [warpgroup] { ptx::barrier_sync(1 + warpgroup, kWarpgroup); };
  if constexpr (kStaged<Out>) {  // until the last tile has left shared memory
    if (thread == 0) ptx::tma_store_wait_read<0>();
    whole_warpgroup();
  }
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    const int64_t n = first_n + i * kSliceRows;
    const Result<T, Out, kTokens> result(args, n + thread / 32 * 16, first_m);
    const auto put = [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      if constexpr (kStaged<Out>) {
        result.template stage<kActivation>(sum[i], shared.result[warpgroup][i].data());
      } else {
        result.template store<kActivation>(sum[i]);
      }
    };
    using A = Activation;
    switch (args.activation) {
      case A::kNone: put(std::integral_constant<A, A::kNone>()); break;
      case A::kReLU: put(std::integral_constant<A, A::kReLU>()); break;
      case A::kGELU: put(std::integral_constant<A, A::kGELU>()); break;
      case A::kSiLU: put(std::integral_constant<A, A::kSiLU>()); break;
    }
  }
  if constexpr (kStaged<Out>) {
    ptx::fence_proxy_async();
    whole_warpgroup();
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const int64_t n = first_n + i * kSliceRows;
      if (n >= args.n) continue;
      Out* tile = shared.result[warpgroup][i].data();
      if (!args.out_by_tma) {
        copy_out<Out, kTokens>(args, tile, n, first_m);
      } else if (thread == 0) {
        ptx::tma_store_2d(&args.out, tile, static_cast<int>(n), first_m);
      }
    }
    if (thread == 0) ptx::tma_store_commit();
  }
}

// ---- a consumer ---------------------------------------------------------------------------------

// Issues the products of one step, from the stage of x that `filled` points at.
template <class T, class Out, int kSlices, int kTokens>
__device__ void multiply(ptx::Accumulator<T> (&sum)[kSlices][kTokens / 2],
                         const Weights<T, kSlices>& weights, int parity, int step, bool accumulate,
                         Shared<T, Out, kSlices, kTokens>& shared, Ring<kStages<kTokens>>& filled) {
  constexpr int kSecondSelector = sizeof(T) == 2 ? 1 : 0, kSlots = Weights<T, kSlices>::kSlots;
  ptx::mbarrier_wait(&shared.full[filled.stage], filled.phase);
  T* x = shared.x[filled.stage].data();
  filled.advance();
  const auto columns = [x](int half) {
    return ptx::matrix_descriptor(x + half * (Record<T>::kStepColumns / 2), Swizzle::k128, 16,
                                  kEightRows);
  };
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    ptx::wgmma_sp<T, kTokens, 0>(sum[i], weights.values[step % kSlots][i][0], columns(0),
                                 weights.word(parity, i, step, 0), accumulate);
  }
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    ptx::wgmma_sp<T, kTokens, kSecondSelector>(sum[i], weights.values[step % kSlots][i][1],
                                               columns(1), weights.word(parity, i, step, 1), true);
  }
  ptx::wgmma_commit();
}

template <class T, class Out, int kSlices, int kTokens>
__device__ void consume(Shared<T, Out, kSlices, kTokens>& shared, const Args& args) {
  constexpr int kSteps = Record<T>::kSteps, kSlots = Weights<T, kSlices>::kSlots;
  const int tiles = args.tiles_m * args.tiles_n;
  Ring<kStages<kTokens>> filled, released;
  const auto release = [&] {
    // A warp lets go when its own quarter of the products is done.
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[released.stage]);
    released.advance();
  };

  Weights<T, kSlices> weights;
  Records<T, kSlices> here(args, Position(args, blockIdx.x).tile_n);
  weights.load_metadata(0, here);
#pragma unroll
  for (int step = 0; step + 1 < kSlots; ++step) weights.load_step(step, here, here);

  // At the beginning of each record the first kSlots - 1 steps of it have been asked for.
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    ptx::Accumulator<T> sum[kSlices][kTokens / 2];
    // Two records at a time: the products of a step run while those of the next are issued.
    int left = args.records;
    for (; left > 2; left -= 2) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const bool first = left == args.records && parity == 0 && step == 0;
          multiply(sum, weights, parity, step, !first, shared, filled);
          ptx::wgmma_wait<1>();
          if (!first) release();
          weights.load_step(step + kSlots - 1, here, here.next());
          if (step == 0) weights.load_metadata(1 - parity, here.next());
        }
        here = here.next();
      }
    }
    ptx::wgmma_wait<0>();
    const bool started = left < args.records;
    if (started) release();

    // The last one or two, of which the last may have fewer steps, one step after the other; what
    // is loaded meanwhile is the first record of the next tile.
    const int next_tile = tile + static_cast<int>(gridDim.x);
    const Position next_at(args, next_tile < tiles ? next_tile : tile);
    const Records<T, kSlices> next(args, next_at.tile_n);
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      if (parity >= left) break;
      const bool last = parity + 1 == left;
      const Records<T, kSlices> following = last ? next : here.next();
      if (!last) weights.load_metadata(1, following);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        weights.load_step(step + kSlots - 1, here, following);
        if (last && step >= args.last_steps) continue;
        multiply(sum, weights, parity, step, started || parity > 0 || step > 0, shared, filled);
        ptx::wgmma_wait<0>();
        release();
      }
      here = following;
    }
    weights.load_metadata(0, here);

    finish_tile(sum, shared, args, Position(args, tile));
  }
  if (threadIdx.x % kWarpgroup == 0) ptx::tma_store_wait<0>();
}

template <class T, class Out, int kSlices, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) sparse24_gemm(const __grid_constant__ Args args) {
  using Memory = Shared<T, Out, kSlices, kTokens>;
  Memory& shared = *shared_memory<Memory>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&args.x);
    for (int stage = 0; stage < kStages<kTokens>; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(shared, args);
  } else {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumers * 4 && ptx::elect_one()) produce(shared, args);
  }
}

// ---- the launch ---------------------------------------------------------------------------------

template <class T, class Out, int kSlices, int kTokens>
void run(const CudaGemmArgs& args, cudaStream_t stream) {
  constexpr int kRows = kConsumers * kSlices * kSliceRows;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles_m = ceil_div(args.m, kTokens), tiles_n = ceil_div(args.n, kRows);
  constexpr int64_t kMax = int64_t{1} << 30;  // so that a whole grid past the last tile is an int
  GOSSAMER_CHECK(args.m <= kMax && args.n <= kMax && args.k <= kMax && tiles_m * tiles_n <= kMax,
                 "sparse24_gemm: ", args.m, " rows of x by a weight [", args.n, ", ", args.k,
                 "] are more than the Hopper kernel counts");

  Args of{};
  const int64_t x_extents[] = {args.k, args.m};
  const int64_t x_pitch[] = {args.x_stride * static_cast<int64_t>(sizeof(T))};
  const int x_box[] = {Record<T>::kStepColumns, kTokens};
  of.x = tensor_map(args.x, sizeof(T), 2, x_extents, x_pitch, x_box, Swizzle::k128);
  const int64_t out_pitch[] = {args.n * static_cast<int64_t>(sizeof(Out))};
  of.out_by_tma =
      kStaged<Out> && out_pitch[0] % 16 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  if (of.out_by_tma) {
    const int64_t out_extents[] = {args.n, args.m};
    const int out_box[] = {kSliceRows, kTokens};
    of.out = tensor_map(args.out, sizeof(Out), 2, out_extents, out_pitch, out_box, Swizzle::k128);
  }
  of.n = args.n;
  of.m = static_cast<int>(args.m);
  of.steps = static_cast<int>(ceil_div(args.k, Record<T>::kStepColumns));
  of.records = static_cast<int>(ceil_div(args.k, kFragmentColumns));
  of.last_steps = of.steps - (of.records - 1) * Record<T>::kSteps;
  of.weight_tiles = static_cast<int>(ceil_div(args.n, kFragmentRows));
  of.tiles_m = static_cast<int>(tiles_m);
  of.tiles_n = static_cast<int>(tiles_n);
  of.weights = reinterpret_cast<const uint4*>(args.panels);
  of.bias = args.bias;
  of.x_scales = args.x_scales;
  of.row_scales = args.row_scales;
  of.result = args.out;
  of.activation = args.activation;

  const int64_t tiles = tiles_m * tiles_n;
  const int64_t blocks =
      args.config.blocks == 0 ? tiles : std::min<int64_t>(tiles, args.config.blocks);
  launch(sparse24_gemm<T, Out, kSlices, kTokens>, dim3(static_cast<unsigned>(blocks)), kThreads,
         sizeof(Shared<T, Out, kSlices, kTokens>), stream, of);
}

template <class T, class Out>
void by_tile(const CudaGemmArgs& args, cudaStream_t stream) {
  const int tile_n = args.config.tile_n, tile_m = args.config.tile_m;
  if (tile_n == 256 && tile_m == 128) return run<T, Out, 2, 128>(args, stream);
  if (tile_n == 128 && tile_m == 256) return run<T, Out, 1, 256>(args, stream);
  if (tile_n == 128 && tile_m == 128) return run<T, Out, 1, 128>(args, stream);
  fail("sparse24_gemm: the Hopper kernel has no tiles of ", tile_n, " x ", tile_m);
}

}  // namespace
}  // namespace gossamer::sparse24
