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
//   - Each tile of x serves all rows of the block, and in tiles of 256 rows of x those of two: a
//     cluster of two blocks with different rows of W shares them, each brings half and multicasts
//     it to both. By arithmetic, these are the bytes a cycle at the full rate (of W for 16-bit
//     types; 8-bit ones have 10/9 of it), and the share of it that is left if shared memory counts
//     reads and writes alike:
//
//       kRows x kTokens   x, written   W    from the L2   share
//          128 x 256          64       18       50         2/3
//          256 x 128          32       36       68         4/5    as many accumulators
//          128 x 128          64       36      100         2/3    for few tiles
//
//     An H200's L2 was seen to give each of its 132 multiprocessors 40.
//
// A grid is persistent: a block goes from tile to tile, and while the result of one is stored, its
// producer fills the ring for the next and its consumers have the first weights on the way.
#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "sparse24/gemm_sm90_tile.cuh"

namespace gossamer::sparse24 {
namespace {

constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
// A multiprocessor has 512 registers for every four warps, one in each warpgroup: 2 x 240 + 24.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

constexpr int kRingBytes = 160 << 10;  // with 64 KiB for the result, what a block may have

template <int kTokens>
constexpr int kStages = kRingBytes / (kTokens * kStepBytes);

// Blocks that share their rows of x.
template <int kTokens>
constexpr int kCluster = kTokens == 256 ? 2 : 1;

template <class T, int kSlices, int kTokens>
struct Shared {
  SharedTile<T, kTokens * kStepBytes / sizeof(T), 1024> x[kStages<kTokens>];
  ResultTile<kTokens> result[kConsumers][kSlices];
  uint64_t full[kStages<kTokens>];   // the bytes of x that arrive
  uint64_t empty[kStages<kTokens>];  // the consumers' warps that have let go
};

struct Args {
  Output out;
  int records, weight_tiles;  // weight_tiles: of 16 rows
  int steps, last_steps;      // of a tile, and of its last record
  int tiles_m, tiles_n;       // a cluster's tiles count as one
  const uint4* weights;
};

// ---- the order of tiles and of stages -----------------------------------------------------------

// Blocks work on consecutive tiles at the same time, so these form a patch of the output: kGroup
// tiles of x by as many of W as it takes. Of 132 tiles, 8 x 16 share their operands best in the L2.
template <int kCluster>
struct Position {
  static constexpr int kGroup = 8;
  int tile_m, tile_n;
  bool first;  // of those in its group with the same rows of W
  __device__ Position(const Args& args, int tile) {
    const int group = tile / (kGroup * args.tiles_n), inside = tile % (kGroup * args.tiles_n);
    const int width = min(kGroup, args.tiles_m - group * kGroup);
    tile_m = group * kGroup + inside % width;
    tile_n = inside / width * kCluster + blockIdx.x % kCluster;
    first = inside % width == 0;
  }
};

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

// The operands of kSlots half steps, of one product a slice each. wgmma reads its registers some
// time after it was issued, so a slot is refilled, for kSlots half steps later, only when its
// products are known to be done.
template <class T, int kSlices>
struct Weights {
  static constexpr int kHalves = 2 * Record<T>::kSteps;  // of a record
  // A whole record where the registers suffice. With 128 sums and 8 slots, ptxas runs the products
  // one by one.
  static constexpr int kSlots = kSlices == 1 ? kHalves : 4;
  uint32_t values[kSlots][kSlices][4];
  // Of two records in turn. (They have names of their own because ptxas runs the products one by
  // one where a register that wgmma reads is copied from another.)
  uint4 metadata[2][kSlices];

  // `half` counts from the beginning of the record `from`, and may lie in the one after it.
  __device__ void load(int half, const Records<T, kSlices>& from,
                       const Records<T, kSlices>& following) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      const uint4* at = half < kHalves ? from.at[i] : following.at[i];
      const uint4 v = ptx::load16(at + half % kHalves * 32);
      uint32_t (&to)[4] = values[half % kSlots][i];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }
  __device__ void load_metadata(int parity, const Records<T, kSlices>& from) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      metadata[parity][i] = ptx::load16(from.at[i] + Record<T>::kMetadata);
    }
  }
  __device__ uint32_t word(int parity, int slice, int half) const {
    const uint4& v = metadata[parity][slice];
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
    return words[sizeof(T) == 2 ? half / 2 : half];
  }
};

// ---- the producer -------------------------------------------------------------------------------

// Brings a record of the block's weights to the L2, so that consumers, who load it when the ring
// has come there, do not wait for DRAM.
template <class T, int kRows>
__device__ void fetch(const Args& args, int tile_n, int record) {
  constexpr int kTiles = kRows / kFragmentRows;
  for (int i = 0; i < kTiles; ++i) {
    const int tile = tile_n * kTiles + i;
    if (tile >= args.weight_tiles) break;
    ptx::bulk_prefetch(args.weights + (int64_t{tile} * args.records + record) * Record<T>::kSize,
                       Record<T>::kSize * 16);
  }
}

template <class T, int kSlices, int kTokens, class X>
__device__ void produce(Shared<T, kSlices, kTokens>& shared, const X& x, const Args& args) {
  constexpr int kBlocks = kCluster<kTokens>;
  constexpr int kShare = kTokens / kBlocks;  // of the rows of x
  // Weights that are loaded three steps ahead can wait for DRAM.
  constexpr bool kFetches = Weights<T, kSlices>::kSlots < Weights<T, kSlices>::kHalves;
  const int rank = blockIdx.x % kBlocks;
  Ring<kStages<kTokens>> ring;
  for (int tile = blockIdx.x / kBlocks; tile < args.tiles_m * args.tiles_n;
       tile += gridDim.x / kBlocks) {
    const Position<kBlocks> at(args, tile);
    const typename X::Tile rows(x, at.tile_m * kTokens + rank * kShare);
    for (int step = 0; step < args.steps; ++step, ring.advance()) {
      if (kFetches && at.first && step % Record<T>::kSteps == 0) {
        fetch<T, kConsumers * kSlices * kSliceRows>(args, at.tile_n, step / Record<T>::kSteps);
      }
      // The first round finds the stages empty: the phase before the first counts as ended.
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      ptx::mbarrier_arrive_expect_tx(full, kTokens * kStepBytes);
      T* to = shared.x[ring.stage].data() + rank * kShare * Record<T>::kStepColumns;
      rows.template load<kBlocks>(to, full, step * Record<T>::kStepColumns);
    }
  }
}

// ---- a consumer ---------------------------------------------------------------------------------

// Issues the products of half a step, from the stage of x that `filled` points at.
template <class T, int kSlices, int kTokens>
__device__ void multiply(ptx::Accumulator<T> (&sum)[kSlices][kTokens / 2],
                         const Weights<T, kSlices>& weights, int parity, int half, bool accumulate,
                         Shared<T, kSlices, kTokens>& shared, Ring<kStages<kTokens>>& filled) {
  constexpr int kSlots = Weights<T, kSlices>::kSlots;
  if (half % 2 == 0) ptx::mbarrier_wait(&shared.full[filled.stage], filled.phase);
  const T* x = shared.x[filled.stage].data() + half % 2 * (Record<T>::kStepColumns / 2);
  if (half % 2 == 1) filled.advance();
  const uint64_t columns = ptx::matrix_descriptor(x, Swizzle::k128, 16, kEightRows);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    const uint32_t metadata = weights.word(parity, i, half);
    if (sizeof(T) == 2 && half % 2 == 1) {
      ptx::wgmma_sp<T, kTokens, sizeof(T) == 2>(sum[i], weights.values[half % kSlots][i], columns,
                                                metadata, accumulate);
    } else {
      ptx::wgmma_sp<T, kTokens, 0>(sum[i], weights.values[half % kSlots][i], columns, metadata,
                                   accumulate);
    }
  }
  ptx::wgmma_commit();
}

template <class T, int kSlices, int kTokens>
__device__ void consume(Shared<T, kSlices, kTokens>& shared, const Args& args) {
  constexpr int kHalves = Weights<T, kSlices>::kHalves, kSlots = Weights<T, kSlices>::kSlots;
  constexpr int kBlocks = kCluster<kTokens>;
  const int tiles = args.tiles_m * args.tiles_n, clusters = gridDim.x / kBlocks;
  const int first_tile = blockIdx.x / kBlocks;
  Ring<kStages<kTokens>> filled, released;
  const auto release = [&] {
    // A warp lets go when its own quarter of the products is done: of what each block has brought.
    uint64_t* empty = &shared.empty[released.stage];
    if constexpr (kBlocks == 1) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
    } else {
      const int lane = threadIdx.x % 32;
      if (lane < kBlocks) ptx::mbarrier_arrive_remote(empty, lane);
    }
    released.advance();
  };

  Weights<T, kSlices> weights;
  Records<T, kSlices> here(args, Position<kBlocks>(args, first_tile).tile_n);
  weights.load_metadata(0, here);
#pragma unroll
  for (int half = 0; half + 1 < kSlots; ++half) weights.load(half, here, here);

  // At the beginning of each record the first kSlots - 1 halves of it have been asked for.
  for (int tile = first_tile; tile < tiles; tile += clusters) {
    ptx::Accumulator<T> sum[kSlices][kTokens / 2];
    // Two records at a time: the products of half a step run while those of the next are issued.
    int left = args.records;
    for (; left > 2; left -= 2) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const bool first = left == args.records && parity == 0 && half == 0;
          multiply(sum, weights, parity, half, !first, shared, filled);
          ptx::wgmma_wait<1>();
          if (half % 2 == 0 && !first) release();
          weights.load(half + kSlots - 1, here, here.next());
          if (half == 0) weights.load_metadata(1 - parity, here.next());
        }
        here = here.next();
      }
    }
    ptx::wgmma_wait<0>();
    const bool started = left < args.records;
    if (started) release();

    // The last one or two, of which the last may have fewer steps, one half after the other; what
    // is loaded meanwhile is the first record of the next tile.
    const int next_tile = tile + clusters;
    const Position<kBlocks> next_at(args, next_tile < tiles ? next_tile : tile);
    const Records<T, kSlices> next(args, next_at.tile_n);
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      if (parity >= left) break;
      const bool last = parity + 1 == left;
      const Records<T, kSlices> following = last ? next : here.next();
      if (!last) weights.load_metadata(1, following);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        weights.load(half + kSlots - 1, here, following);
        if (last && half >= 2 * args.last_steps) continue;
        multiply(sum, weights, parity, half, started || parity > 0 || half > 0, shared, filled);
        ptx::wgmma_wait<0>();
        if (half % 2 == 1) release();
      }
      here = following;
    }
    weights.load_metadata(0, here);

    const Position<kBlocks> at(args, tile);
    const int64_t first_n =
        (int64_t{at.tile_n} * kConsumers + threadIdx.x / kWarpgroup) * kSlices * kSliceRows;
    finish_tile<T, kSlices, kTokens>(sum, shared.result[threadIdx.x / kWarpgroup], args.out,
                                     first_n, at.tile_m * kTokens);
  }
  if (threadIdx.x % kWarpgroup == 0) ptx::tma_store_wait<0>();
}

template <class T, int kSlices, int kTokens, class X>
__global__ void __launch_bounds__(kThreads, 1)
    sparse24_gemm(const __grid_constant__ X x, const __grid_constant__ Args args) {
  using Memory = Shared<T, kSlices, kTokens>;
  Memory& shared = *shared_memory<Memory>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&x.map);
    for (int stage = 0; stage < kStages<kTokens>; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumers * 4 * kCluster<kTokens>);
    }
    ptx::fence_mbarrier_init();
  }
  const auto sync = [] {
    if constexpr (kCluster<kTokens> == 1) {
      __syncthreads();
    } else {
      ptx::cluster_sync();
    }
  };
  sync();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume(shared, args);
  } else {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumers * 4 && ptx::elect_one()) produce(shared, x, args);
  }
  if (kCluster<kTokens> > 1) sync();  // until then the other block writes and arrives here
}

// ---- the launch ---------------------------------------------------------------------------------

// `map_of` gives x for tiles of so many rows.
template <class T, int kSlices, int kTokens, class MapOf>
void run(const CudaGemmArgs& args, const MapOf& map_of, cudaStream_t stream) {
  constexpr int kRows = kConsumers * kSlices * kSliceRows;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles_m = ceil_div(args.m, kTokens), tiles_n = ceil_div(args.n, kRows);
  constexpr int64_t kMax = int64_t{1} << 30;  // so that a whole grid past the last tile is an int
  GOSSAMER_CHECK(args.m <= kMax && args.n <= kMax && args.k <= kMax && tiles_m * tiles_n <= kMax,
                 "sparse24_gemm: ", args.m, " rows of x by a weight [", args.n, ", ", args.k,
                 "] are more than the Hopper kernel counts");

  Args of{};
  of.out = output_of(args, kTokens);
  of.steps = static_cast<int>(ceil_div(args.k, Record<T>::kStepColumns));
  of.records = static_cast<int>(ceil_div(args.k, kFragmentColumns));
  of.last_steps = of.steps - (of.records - 1) * Record<T>::kSteps;
  of.weight_tiles = static_cast<int>(ceil_div(args.n, kFragmentRows));
  of.tiles_m = static_cast<int>(tiles_m);
  of.tiles_n = static_cast<int>(ceil_div(tiles_n, kCluster<kTokens>));
  of.weights = reinterpret_cast<const uint4*>(args.panels);

  const int64_t tiles = int64_t{of.tiles_m} * of.tiles_n;
  const int64_t wanted = std::max(args.config.blocks / kCluster<kTokens>, 1);
  const int64_t clusters = args.config.blocks == 0 ? tiles : std::min(tiles, wanted);
  const auto x = map_of(kTokens / kCluster<kTokens>);
  launch_cluster(kCluster<kTokens>, sparse24_gemm<T, kSlices, kTokens, std::decay_t<decltype(x)>>,
                 dim3(static_cast<unsigned>(clusters * kCluster<kTokens>)), kThreads,
                 sizeof(Shared<T, kSlices, kTokens>), stream, x, of);
}

template <class T, class MapOf>
void by_tile(const CudaGemmArgs& args, const MapOf& map_of, cudaStream_t stream) {
  const int tile_n = args.config.tile_n, tile_m = args.config.tile_m;
  if (tile_n == 256 && tile_m == 128) return run<T, 2, 128>(args, map_of, stream);
  if (tile_n == 128 && tile_m == 256) return run<T, 1, 256>(args, map_of, stream);
  if (tile_n == 128 && tile_m == 128) return run<T, 1, 128>(args, map_of, stream);
  fail("sparse24_gemm: the Hopper kernel has no tiles of ", tile_n, " x ", tile_m);
}

template <class T>
void multiply_matrix(const CudaGemmArgs& args, cudaStream_t stream) {
  by_tile<T>(args, [&](int tokens) { return matrix_map<T>(args, tokens); }, stream);
}

}  // namespace
}  // namespace gossamer::sparse24
