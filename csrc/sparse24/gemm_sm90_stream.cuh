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

namespace gossamer::sparse24 {
namespace {

constexpr int kStreamThreads = kConsumers * kWarpgroup + 32;
constexpr int kRowTiles = kConsumers * kSliceRows / kFragmentRows;
static_assert(kStreamTileN == kConsumers * kSliceRows);
constexpr int kBlockBytes = 226 << 10;  // of shared memory, but for barriers and alignment

template <class T, int kTokens>
struct Stage {
  // Of more than 64 rows of x, whole records would leave room for two stages only.
  static constexpr int kParts = kTokens <= 64 ? 1 : 2;  // of a record
  static constexpr int kSteps = Record<T>::kSteps / kParts;
  static constexpr int kMetadata = 2 * kSteps * 32;  // where it begins, in uint4 of a row tile
  static constexpr int kSize = kMetadata + 32;
  static constexpr int kWeightBytes = kRowTiles * kSize * 16;
  static constexpr int kXBytes = kSteps * kTokens * kStepBytes;

  SharedTile<T, kXBytes / sizeof(T), 1024> x;  // [step][row of x][128 bytes]
  SharedTile<uint4, kWeightBytes / 16, 128> weights;
};

template <class T, class Out, int kTokens>
struct StreamShared {
  static constexpr int kResultBytes =
      kStaged<Out> ? kConsumers * kTokens * kSliceRows * static_cast<int>(sizeof(Out)) : 4096;
  static constexpr int kStages =
      std::min(8, (kBlockBytes - kResultBytes) /
                      (Stage<T, kTokens>::kWeightBytes + Stage<T, kTokens>::kXBytes));
  static_assert(kStages >= 3);

  Stage<T, kTokens> stages[kStages];
  ResultTile<Out, kTokens> result[kConsumers][1];
  uint64_t full[kStages];   // the bytes that arrive
  uint64_t empty[kStages];  // the consumers' warps that have let go
  int arrived[kConsumers];  // the blocks that have left their sums before this one
};

struct StreamArgs {
  TensorMap x;
  Output out;
  const uint4* weights;
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

template <class T, class Out, int kTokens>
__device__ void produce(StreamShared<T, Out, kTokens>& shared, const StreamArgs& args) {
  using S = Stage<T, kTokens>;
  Ring<StreamShared<T, Out, kTokens>::kStages> ring;
  const int64_t end = first_of_block(args, blockIdx.x + 1);
  for (int64_t at = first_of_block(args, blockIdx.x); at < end; ++at) {
    const int tile = static_cast<int>(at / args.records);
    const int record = static_cast<int>(at % args.records);
    const int tile_n = tile / args.tiles_m, tile_m = tile % args.tiles_m;
    for (int part = 0; part < S::kParts; ++part, ring.advance()) {
      S& stage = shared.stages[ring.stage];
      uint64_t* full = &shared.full[ring.stage];
      // The first round finds the stages empty: the phase before the first counts as ended.
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, S::kWeightBytes + S::kXBytes);
      for (int i = 0; i < kRowTiles; ++i) {
        // Rows past N take the last tile of 16: what they multiply is not stored, but their
        // metadata have to be legal.
        const int row_tile = min(tile_n * kRowTiles + i, args.weight_tiles - 1);
        const uint4* from =
            args.weights + (int64_t{row_tile} * args.records + record) * Record<T>::kSize;
        uint4* to = stage.weights.data() + i * S::kSize;
        if constexpr (S::kParts == 1) {
          ptx::bulk_load(to, from, S::kSize * 16, full);
        } else {
          ptx::bulk_load(to, from + part * S::kMetadata, S::kMetadata * 16, full);
          ptx::bulk_load(to + S::kMetadata, from + Record<T>::kMetadata, 32 * 16, full);
        }
      }
      for (int step = 0; step < S::kSteps; ++step) {
        const int column =
            record * kFragmentColumns + (part * S::kSteps + step) * Record<T>::kStepColumns;
        // Of a tile past the edges of x, too, all bytes arrive; those outside are zeros.
        ptx::tma_load_2d(stage.x.data() + step * kTokens * Record<T>::kStepColumns, &args.x, full,
                         column, tile_m * kTokens);
      }
    }
  }
}

// ---- a consumer ---------------------------------------------------------------------------------

// Waits for a stage and multiplies what it holds: `part` of a record.
template <class T, int kTokens>
__device__ __forceinline__ void multiply(ptx::Accumulator<T> (&sum)[kTokens / 2],
                                         Stage<T, kTokens>& stage, int part, bool accumulate) {
  using S = Stage<T, kTokens>;
  const uint4* from = stage.weights.data() + threadIdx.x / 32 * S::kSize + threadIdx.x % 32;
  uint32_t values[2 * S::kSteps][4];
#pragma unroll
  for (int half = 0; half < 2 * S::kSteps; ++half) {
    const uint4 v = from[half * 32];
    values[half][0] = v.x, values[half][1] = v.y, values[half][2] = v.z, values[half][3] = v.w;
  }
  const uint4 metadata = from[S::kMetadata];
  uint32_t words[] = {metadata.x, metadata.y, metadata.z, metadata.w};
  if (S::kParts == 2 && part == 1) {  // the words of the record's second half
    words[0] = words[2], words[1] = words[3];
  }
  ptx::wgmma_fence();
#pragma unroll
  for (int half = 0; half < 2 * S::kSteps; ++half) {
    const T* x =
        stage.x.data() + (half / 2 * kTokens * 2 + half % 2) * (Record<T>::kStepColumns / 2);
    const uint64_t columns = ptx::matrix_descriptor(x, Swizzle::k128, 16, kEightRows);
    const uint32_t word = words[sizeof(T) == 2 ? half / 2 : half];
    if (sizeof(T) == 2 && half % 2 == 1) {
      ptx::wgmma_sp<T, kTokens, sizeof(T) == 2>(sum, values[half], columns, word, true);
    } else {
      ptx::wgmma_sp<T, kTokens, 0>(sum, values[half], columns, word, accumulate || half > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

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

template <class T, class Out, int kTokens>
__device__ void consume(StreamShared<T, Out, kTokens>& shared, const StreamArgs& args) {
  using S = Stage<T, kTokens>;
  Ring<StreamShared<T, Out, kTokens>::kStages> ring;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int64_t end = first_of_block(args, blockIdx.x + 1);
  for (int64_t at = first_of_block(args, blockIdx.x); at < end;) {
    const Segment segment(args, at, end);
    at += segment.count;
    ptx::Accumulator<T> sum[kTokens / 2];
    for (int record = 0; record < segment.count; ++record) {
#pragma unroll
      for (int part = 0; part < S::kParts; ++part, ring.advance()) {
        ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
        multiply<T, kTokens>(sum, shared.stages[ring.stage], part, record > 0 || part > 0);
        // A warp lets go when its own quarter of the products is done.
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[ring.stage]);
      }
    }
    const int first_m = segment.tile % args.tiles_m * kTokens;
    if (segment.count < args.records &&
        !meet<T, kTokens>(sum, args, segment, args.out.m - first_m, shared.arrived[warpgroup])) {
      continue;
    }
    const ptx::Accumulator<T>(&sums)[1][kTokens / 2] =
        reinterpret_cast<const ptx::Accumulator<T>(&)[1][kTokens / 2]>(sum);
    const int64_t first_n =
        int64_t{segment.tile / args.tiles_m} * kStreamTileN + warpgroup * kSliceRows;
    finish_tile<T, Out, 1, kTokens>(sums, shared.result[warpgroup], args.out, first_n, first_m);
  }
  if (threadIdx.x % kWarpgroup == 0) ptx::tma_store_wait<0>();
}

template <class T, class Out, int kTokens>
__global__ void __launch_bounds__(kStreamThreads, 1)
    sparse24_stream(const __grid_constant__ StreamArgs args) {
  using Memory = StreamShared<T, Out, kTokens>;
  Memory& shared = *shared_memory<Memory>();
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&args.x);
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
    produce(shared, args);
  }
}

// ---- the launch ---------------------------------------------------------------------------------

template <class T, class Out, int kTokens>
void run_stream(const CudaGemmArgs& args, cudaStream_t stream) {
  const CudaGemmConfig& config = args.config;
  constexpr int64_t kMax = int64_t{1} << 30;
  GOSSAMER_CHECK(args.m <= kMax && args.n <= kMax && args.k <= kMax, "sparse24_gemm: ", args.m,
                 " rows of x by a weight [", args.n, ", ", args.k,
                 "] are more than the Hopper kernel counts");
  StreamArgs of{};
  of.x = step_map<T>(args, kTokens);
  of.out = output_of<Out>(args, kTokens);
  of.weights = reinterpret_cast<const uint4*>(args.panels);
  of.records = static_cast<int>(ceil_div(args.k, kFragmentColumns));
  of.weight_tiles = static_cast<int>(ceil_div(args.n, kFragmentRows));
  of.tiles_m = static_cast<int>(ceil_div(args.m, kTokens));
  of.work = stream_tiles(config, args.m, args.n) * of.records;
  of.sums = args.workspace;
  of.counters = args.counters;
  launch(sparse24_stream<T, Out, kTokens>, dim3(static_cast<unsigned>(config.blocks)),
         kStreamThreads, sizeof(StreamShared<T, Out, kTokens>), stream, of);
}

template <class T, class Out>
void stream_by_tile(const CudaGemmArgs& args, cudaStream_t stream) {
  switch (args.config.tile_m) {
    case 16: return run_stream<T, Out, 16>(args, stream);
    case 32: return run_stream<T, Out, 32>(args, stream);
    case 64: return run_stream<T, Out, 64>(args, stream);
    case 128: return run_stream<T, Out, 128>(args, stream);
    default: fail("sparse24_gemm: no tiles of ", args.config.tile_m, " rows of x");
  }
}

}  // namespace
}  // namespace gossamer::sparse24
