#pragma once
// 2:4 GEMM on Hopper for rows of x that fill no large tiles:
//
//   out[m, n] = act(x_scales[m] row_scales[n] sum over k of x[m, k] W[n, k]  +  bias[n])
//
// Bound by reading the weights once. Everything comes to shared memory by TMA, asked for by one
// thread, so that a multiprocessor has 150 KB or more on their way whatever its warps wait for: at
// the 36 GB/s that an H200 has for each that is four times what covers the latency of DRAM.
//
//   warpgroup 0   rows  0 -  63 of W  |                        a stage: a record (256 columns, or
//   warpgroup 1   rows 64 - 127       |  x kTokens rows of x    half of it) of 8 tiles of 16 rows
//   of warp 8        the producer                                  W, and as many columns of x
//
// The weights are the sparse left operand of wgmma.sp, from registers: a warp reads the fragments
// of its 16 rows as they lie in the stage, 16 bytes a lane. x is the right one, which both
// warpgroups read from shared memory once for their 64 rows; mma.sp, whose warps have 16 or 32
// rows, reads it four times as often.
//
// Work is cut as in Osama et al., "Stream-K", 2023 (arXiv:2301.03598): all records of all tiles,
// one tile after the other, are divided evenly among the blocks, wherever tiles end.
//
//   tile        0           1           2           3
//   records |. . . . . .|. . . . . .|. . . . . .|. . . . . .|
//   block    0 0 0 0 0 1 1 1 1 1 2 2 2 2 2 3 3 3 3 3 4 4 4 4
//
// Where blocks share a tile, each leaves its sums in the workspace, and the last one to arrive adds
// them up in the order of the blocks: the same operands give the same bits in every run. No block
// waits for another.
#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "sparse24/gemm_sm90_tile.cuh"
#include "sparse24/int4.cuh"

namespace gossamer::sparse24 {
namespace {

constexpr int kStreamThreads = kConsumers * kWarpgroup + 32;
constexpr int kRowTiles = kConsumers * kSliceRows / kFragmentRows;
static_assert(kStreamTileN == kConsumers * kSliceRows);
constexpr int kBlockBytes = 226 << 10;  // of shared memory, but for barriers and alignment

// What a kernel does with its weights, W below, is said by StoredWeights or Int4Weights:
//
//   X                                  the type of x
//   kPieces                            uint4 of a lane for a record of 16 rows, beside one of
//                                      metadata
//   W(args, row_tile)                  for this warp's 16 rows
//   announce(args, record, count)      brings nearer what does not come with these records' stages
//   prepare<kParts>(args, record, part)      asks for that of a part of a record,
//   take()                             and that is what is multiplied next
//   multiply(sum, stage, part, accumulate)   adds the products of a part to the sums
template <class W, int kTokens>
struct Stage {
  using X = typename W::X;
  // Of more than 64 rows of x, whole records would leave room for two stages only.
  static constexpr int kParts = kTokens <= 64 ? 1 : 2;  // of a record
  static constexpr int kSteps = Record<X>::kSteps / kParts;
  static constexpr int kHalves = 2 * kSteps;
  static constexpr int kPieces = W::kPieces / kParts;
  static constexpr int kMetadata = kPieces * 32;  // where it begins, in uint4 of a row tile
  static constexpr int kSize = kMetadata + 32;
  static constexpr int kWeightBytes = kRowTiles * kSize * 16;
  static constexpr int kXBytes = kSteps * kTokens * kStepBytes;

  SharedTile<X, kXBytes / sizeof(X), 1024> x;  // [step][row of x][128 bytes]
  SharedTile<uint4, kWeightBytes / 16, 128> weights;

  __device__ const uint4* of_lane() {
    return weights.data() + threadIdx.x / 32 * kSize + threadIdx.x % 32;
  }
  __device__ uint64_t columns(int half) {
    const X* at = x.data() + (half / 2 * kTokens * 2 + half % 2) * (Record<X>::kStepColumns / 2);
    return ptx::matrix_descriptor(at, Swizzle::k128, 16, kEightRows);
  }
};

template <class W, int kTokens>
struct StreamShared {
  using S = Stage<W, kTokens>;
  static constexpr int kResultBytes = kConsumers * static_cast<int>(sizeof(ResultTile<kTokens>));
  static constexpr int kStages =
      std::min(9, (kBlockBytes - kResultBytes) / (S::kWeightBytes + S::kXBytes));
  static_assert(kStages >= 3);

  S stages[kStages];
  ResultTile<kTokens> result[kConsumers][1];
  uint64_t full[kStages];   // the bytes that arrive
  uint64_t empty[kStages];  // the consumers' warps that have let go
  int arrived[kConsumers];  // the blocks that have left their sums before this one
};

struct StreamArgs {
  Output out;
  const uint4* weights;
  GroupScales groups;         // of int4 weights
  int records, weight_tiles;  // weight_tiles: of 16 rows
  int tiles_m;
  int64_t work;  // records of all tiles
  void* sums;
  int32_t* counters;
};

// ---- who computes what --------------------------------------------------------------------------

__device__ __forceinline__ int64_t first_of_block(const StreamArgs& args, int block) {
  return args.work * block / gridDim.x;
}
// The block that computes a record.
__device__ __forceinline__ int block_of(const StreamArgs& args, int64_t at) {
  return static_cast<int>(((at + 1) * gridDim.x - 1) / args.work);
}

// A block's consecutive records of one tile.
struct Segment {
  int tile, first, count;
  __device__ Segment(const StreamArgs& args, int64_t at, int64_t end)
      : tile(static_cast<int>(at / args.records)),
        first(static_cast<int>(at % args.records)),
        count(static_cast<int>(min(int64_t{args.records - first}, end - at))) {}
};

// ---- the producer -------------------------------------------------------------------------------

template <class W, int kTokens, class XMap>
__device__ void produce(StreamShared<W, kTokens>& shared, const XMap& x, const StreamArgs& args) {
  using S = Stage<W, kTokens>;
  using X = typename W::X;
  constexpr int kRecord = (W::kPieces + 1) * 32;
  Ring<StreamShared<W, kTokens>::kStages> ring;
  const int64_t end = first_of_block(args, blockIdx.x + 1);
  for (int64_t at = first_of_block(args, blockIdx.x); at < end;) {
    const Segment segment(args, at, end);
    at += segment.count;
    const int tile_n = segment.tile / args.tiles_m, tile_m = segment.tile % args.tiles_m;
    const typename XMap::Tile rows(x, tile_m * kTokens);
    for (int i = 0; i < segment.count * S::kParts; ++i, ring.advance()) {
      const int record = segment.first + i / S::kParts, part = i % S::kParts;
      S& stage = shared.stages[ring.stage];
      uint64_t* full = &shared.full[ring.stage];
      // The first round finds the stages empty: the phase before the first counts as ended.
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, S::kWeightBytes + S::kXBytes);
      for (int t = 0; t < kRowTiles; ++t) {
        // Rows past N take the last tile of 16: what they multiply is not stored, but their
        // metadata have to be legal.
        const int row_tile = min(tile_n * kRowTiles + t, args.weight_tiles - 1);
        const uint4* from = args.weights + (int64_t{row_tile} * args.records + record) * kRecord;
        uint4* to = stage.weights.data() + t * S::kSize;
        if constexpr (S::kParts == 1) {
          ptx::bulk_load(to, from, S::kSize * 16, full);
        } else {
          ptx::bulk_load(to, from + part * S::kMetadata, S::kMetadata * 16, full);
          ptx::bulk_load(to + S::kMetadata, from + W::kPieces * 32, 32 * 16, full);
        }
      }
      for (int step = 0; step < S::kSteps; ++step) {
        const int column =
            record * kFragmentColumns + (part * S::kSteps + step) * Record<X>::kStepColumns;
        rows.template load<1>(stage.x.data() + step * kTokens * Record<X>::kStepColumns, full,
                              column);
      }
    }
  }
}

// ---- a consumer ---------------------------------------------------------------------------------

// The metadata of a part of a record: a word for each step (16-bit types) or half step.
template <class S>
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const uint4* of_lane, int part) {
  const uint4 v = of_lane[S::kMetadata];
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  if (S::kParts == 2 && part == 1) words[0] = words[2], words[1] = words[3];
}

template <class X, int kTokens>
__device__ __forceinline__ void multiply_half(ptx::Accumulator<X> (&sum)[kTokens / 2],
                                              const uint32_t (&values)[4], uint64_t columns,
                                              const uint32_t (&words)[4], int half,
                                              bool accumulate) {
  const uint32_t word = words[sizeof(X) == 2 ? half / 2 : half];
  if (sizeof(X) == 2 && half % 2 == 1) {
    ptx::wgmma_sp<X, kTokens, sizeof(X) == 2>(sum, values, columns, word, accumulate);
  } else {
    ptx::wgmma_sp<X, kTokens, 0>(sum, values, columns, word, accumulate);
  }
}

// Values of the type of x: 16 bytes a lane are the left operand of half a step.
template <class T>
struct StoredWeights {
  using X = T;
  static constexpr int kPieces = 2 * Record<T>::kSteps;

  __device__ StoredWeights(const StreamArgs&, int /*row_tile*/) {}
  __device__ void announce(const StreamArgs&, int /*record*/, int /*count*/) {}
  template <int kParts>
  __device__ void prepare(const StreamArgs&, int /*record*/, int /*part*/) {}
  __device__ void take() {}

  // Multiplies what a stage holds, `part` of a record.
  template <int kTokens>
  __device__ __forceinline__ void multiply(ptx::Accumulator<T> (&sum)[kTokens / 2],
                                           Stage<StoredWeights, kTokens>& stage, int part,
                                           bool accumulate) const {
    using S = Stage<StoredWeights, kTokens>;
    const uint4* from = stage.of_lane();
    uint32_t values[S::kHalves][4], words[4];
#pragma unroll
    for (int half = 0; half < S::kHalves; ++half) {
      const uint4 v = from[half * 32];
      values[half][0] = v.x, values[half][1] = v.y, values[half][2] = v.z, values[half][3] = v.w;
    }
    load_words<S>(words, from, part);
    ptx::wgmma_fence();
#pragma unroll
    for (int half = 0; half < S::kHalves; ++half) {
      multiply_half<T, kTokens>(sum, values[half], stage.columns(half), words, half,
                                accumulate || half > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
};

// int4 values, a word for half a step, which are widened. The products of a unit of kUnitHalves are
// summed from 0, in a fragment of their own, and a fused multiply-add with the scales of the lane's
// rows g and g + 8 adds that to the sums, units in increasing order.
template <class T, int kUnitHalves>
struct Int4Weights {
  using X = T;
  static constexpr int kPieces = Record<T>::kSteps / 2;
  static constexpr int kUnits = 2 * Record<T>::kSteps / kUnitHalves;  // of a record

  const float* of_rows[2];  // their scales
  float coming[kUnits][2], scales[kUnits][2];

  // Rows past N take the scales of the last: what they multiply is not stored.
  __device__ Int4Weights(const StreamArgs& args, int row_tile) {
    const int64_t row = int64_t{row_tile} * kFragmentRows + threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of_rows[half] =
          args.groups.scales + min(row + 8 * half, args.out.n - 1) * args.groups.columns;
    }
  }

  // The scales of a row's records lie side by side, 16 of them in a line that DRAM would else be
  // waited for.
  __device__ __forceinline__ void announce(const StreamArgs& args, int record, int count) {
    if (threadIdx.x % 4 > 1) return;
    const unsigned columns = args.groups.columns;
    const unsigned begin = min(column_of_unit(args.groups, record * kUnits), columns);
    const unsigned end =
        min(column_of_unit(args.groups, (record + count) * kUnits - 1) + 1, columns);
    const float* row = of_rows[threadIdx.x % 4];
    constexpr uintptr_t kAligned = ~uintptr_t{15};
    const auto first = reinterpret_cast<uintptr_t>(row + begin) & kAligned;
    const auto last = reinterpret_cast<uintptr_t>(row + end) & kAligned;
    if (first < last) {
      ptx::bulk_prefetch(reinterpret_cast<const void*>(first), static_cast<int>(last - first));
    }
  }

  // Past the last column there are no scales, and the sums are 0.
  template <int kParts>
  __device__ __forceinline__ void prepare(const StreamArgs& args, int record, int part) {
    constexpr int kUnitsHere = kUnits / kParts;
#pragma unroll
    for (int unit = 0; unit < kUnitsHere; ++unit) {
      const unsigned column =
          column_of_unit(args.groups, record * kUnits + part * kUnitsHere + unit);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        coming[unit][half] = column < args.groups.columns ? __ldg(of_rows[half] + column) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void take() {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scales[unit][half] = coming[unit][half];
    }
  }

  template <int kTokens>
  __device__ __forceinline__ void multiply(float (&sum)[kTokens / 2],
                                           Stage<Int4Weights, kTokens>& stage, int part,
                                           bool accumulate) const {
    using S = Stage<Int4Weights, kTokens>;
    constexpr int kUnitsHere = S::kHalves / kUnitHalves;
    // Units that are multiplied side by side; with more rows of x there are no registers for two.
    constexpr int kTogether = kUnitsHere < 2 || kTokens > 32 ? 1 : 2;
    const uint4* from = stage.of_lane();
    uint32_t packed[S::kPieces][4], words[4];
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      const uint4 v = from[piece * 32];
      packed[piece][0] = v.x, packed[piece][1] = v.y, packed[piece][2] = v.z,
      packed[piece][3] = v.w;
    }
    load_words<S>(words, from, part);
    if (!accumulate) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;
    }
#pragma unroll
    for (int first = 0; first < kUnitsHere; first += kTogether) {
      uint32_t values[kTogether * kUnitHalves][4];
      float fresh[kTogether][kTokens / 2];
#pragma unroll
      for (int i = 0; i < kTogether * kUnitHalves; ++i) {
        const int half = first * kUnitHalves + i;
        widen<T>(values[i], packed[half / 4][half % 4]);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int i = 0; i < kUnitHalves; ++i) {
          const int half = (first + u) * kUnitHalves + i;
          multiply_half<T, kTokens>(fresh[u], values[u * kUnitHalves + i], stage.columns(half),
                                    words, half, i > 0);
        }
        ptx::wgmma_commit();
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        u + 1 < kTogether ? ptx::wgmma_wait<1>() : ptx::wgmma_wait<0>();
        const float (&scale)[2] = scales[first + u];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          sum[i] = __fmaf_rn(fresh[u][i], scale[i / 2 % 2], sum[i]);
        }
      }
    }
  }
};

// Leaves the sums of a part of a tile in the workspace; the last of its blocks to do so gets the
// total of all, and true.
template <class T, int kTokens>
__device__ bool meet(ptx::Accumulator<T> (&sum)[kTokens / 2], const StreamArgs& args,
                     const Segment& segment, int tokens, int& arrived) {
  using Sum = ptx::Accumulator<T>;
  constexpr int kSlotSize = kTokens / 2 * kWarpgroup;  // of a warpgroup: [register][thread]
  const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int64_t of_tile = int64_t{segment.tile} * args.records;
  const int first = block_of(args, of_tile), last = block_of(args, of_tile + args.records - 1);
  // Of a block, the first tile may have begun in the block before, and the last go on in the next.
  const auto slot = [&](int block) {
    const bool begins_there = first_of_block(args, block) >= of_tile;
    return static_cast<Sum*>(args.sums) +
           ((int64_t{block} * 2 + (begins_there ? 0 : 1)) * kConsumers + warpgroup) * kSlotSize +
           thread;
  };
  Sum* mine = slot(blockIdx.x);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    if (i / 4 * 8 < tokens) mine[i * kWarpgroup] = sum[i];
  }
  __threadfence();  // the sums are there for whoever sees the count
  sync_warpgroup();
  int32_t* counter = args.counters + segment.tile * kConsumers + warpgroup;
  if (thread == 0) {
    arrived = atomicAdd(counter, 1);
    if (arrived == last - first) *counter = 0;  // for the next launch
  }
  sync_warpgroup();
  if (arrived != last - first) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0;
#pragma unroll 2
  for (int block = first; block <= last; ++block) {
    const Sum* from = slot(block);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      if (i / 4 * 8 < tokens) sum[i] += from[i * kWarpgroup];
    }
  }
  return true;
}

template <class W, int kTokens>
__device__ void consume(StreamShared<W, kTokens>& shared, const StreamArgs& args) {
  using S = Stage<W, kTokens>;
  using T = typename W::X;
  constexpr bool kEarly = S::kParts == 1;  // there are registers for what two stages need
  Ring<StreamShared<W, kTokens>::kStages> ring;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int64_t end = first_of_block(args, blockIdx.x + 1);
  for (int64_t at = first_of_block(args, blockIdx.x); at < end;) {
    const Segment segment(args, at, end);
    at += segment.count;
    W weights(args, segment.tile / args.tiles_m * kRowTiles + static_cast<int>(threadIdx.x) / 32);
    ptx::Accumulator<T> sums[1][kTokens / 2];
    auto& sum = sums[0];
    if (kEarly) {
      weights.announce(args, segment.first, segment.count);
      weights.template prepare<S::kParts>(args, segment.first, 0);
    }
    for (int record = 0; record < segment.count; ++record) {
#pragma unroll
      for (int part = 0; part < S::kParts; ++part, ring.advance()) {
        if (!kEarly) weights.template prepare<S::kParts>(args, segment.first + record, part);
        weights.take();
        if (kEarly && record + 1 < segment.count) {
          weights.template prepare<S::kParts>(args, segment.first + record + 1, part);
        }
        ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
        weights.template multiply<kTokens>(sum, shared.stages[ring.stage], part,
                                           record > 0 || part > 0);
        // A warp lets go when its own quarter of the products is done.
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[ring.stage]);
      }
    }
    const int first_m = segment.tile % args.tiles_m * kTokens;
    if (segment.count < args.records &&
        !meet<T, kTokens>(sum, args, segment, args.out.m - first_m, shared.arrived[warpgroup])) {
      continue;
    }
    const int64_t first_n =
        int64_t{segment.tile / args.tiles_m} * kStreamTileN + warpgroup * kSliceRows;
    finish_tile<T, 1, kTokens>(sums, shared.result[warpgroup], args.out, first_n, first_m);
  }
  if (threadIdx.x % kWarpgroup == 0) ptx::tma_store_wait<0>();
}

template <class W, int kTokens, class XMap>
__global__ void __launch_bounds__(kStreamThreads, 1)
    sparse24_stream(const __grid_constant__ XMap x, const __grid_constant__ StreamArgs args) {
  using Memory = StreamShared<W, kTokens>;
  Memory& shared = *shared_memory<Memory>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&x.map);
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    consume(shared, args);
  } else if (ptx::elect_one()) {
    produce(shared, x, args);
  }
}

// ---- the launch ---------------------------------------------------------------------------------

template <class W, int kTokens, class MapOf>
void run_stream(const CudaGemmArgs& args, const MapOf& map_of, const GroupScales& groups,
                cudaStream_t stream) {
  const CudaGemmConfig& config = args.config;
  constexpr int64_t kMax = int64_t{1} << 30;
  GOSSAMER_CHECK(args.m <= kMax && args.n <= kMax && args.k <= kMax, "sparse24_gemm: ", args.m,
                 " rows of x by a weight [", args.n, ", ", args.k,
                 "] are more than the Hopper kernel counts");
  StreamArgs of{};
  of.out = output_of(args, kTokens);
  of.weights = reinterpret_cast<const uint4*>(args.panels);
  of.groups = groups;
  of.records = static_cast<int>(ceil_div(args.k, kFragmentColumns));
  of.weight_tiles = static_cast<int>(ceil_div(args.n, kFragmentRows));
  of.tiles_m = static_cast<int>(ceil_div(args.m, kTokens));
  of.work = stream_tiles(config, args.m, args.n) * of.records;
  of.sums = args.workspace;
  of.counters = args.counters;
  const auto x = map_of(kTokens);
  launch(sparse24_stream<W, kTokens, std::decay_t<decltype(x)>>,
         dim3(static_cast<unsigned>(config.blocks)), kStreamThreads,
         sizeof(StreamShared<W, kTokens>), stream, x, of);
}

template <class W, class MapOf>
void stream_by_tile(const CudaGemmArgs& args, const MapOf& map_of, const GroupScales& groups,
                    cudaStream_t stream) {
  switch (args.config.tile_m) {
    case 16: return run_stream<W, 16>(args, map_of, groups, stream);
    case 32: return run_stream<W, 32>(args, map_of, groups, stream);
    case 64: return run_stream<W, 64>(args, map_of, groups, stream);
    case 128: return run_stream<W, 128>(args, map_of, groups, stream);
    default: fail("sparse24_gemm: no tiles of ", args.config.tile_m, " rows of x");
  }
}

template <class W>
void stream_matrix(const CudaGemmArgs& args, const GroupScales& groups, cudaStream_t stream) {
  const auto map_of = [&](int tokens) { return matrix_map<typename W::X>(args, tokens); };
  stream_by_tile<W>(args, map_of, groups, stream);
}

}  // namespace
}  // namespace gossamer::sparse24
