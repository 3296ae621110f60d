#pragma once
// 2:4 GEMM for many rows of x:
//
//   y[m,n] = act(x_scale[m] * row_scale[n] * sum_k x[m,k] W[n,k] + b[n])
//
// The rows of x are those of a matrix, or what the pixels of a convolution see (Rows, below).
//
// Bound by arithmetic: mma.sp at full speed takes 16 x 8 products of a step in the time in which
// shared memory delivers 256 bytes a tensor core, so both operands go through shared memory and
// every fragment read from it is used several times. A block computes 128 rows of W against 256 (or
// 128) rows of x, a warp 64 against 64 (or 32), and of few rows of W 64 against as many:
//
//               x rows 0-63   64-127   128-191   192-255
//   W rows  0- 63 [ warp 0 |  warp 2 |  warp 4 |  warp 6 ]
//   W rows 64-127 [ warp 1 |  warp 3 |  warp 5 |  warp 7 ]
//
// A stage is 128 bytes of every row of x, two steps: 64 columns of 16-bit or 128 of 8-bit values.
// Four stages: one is multiplied while cp.async fills the others.
//
//   x         [row][8 pieces of 16 bytes], piece p of row r at p xor (r mod 8): the eight rows that
//             ldmatrix reads at one p lie in different banks
//   weights   [tile of 16 rows][step][lane] 16 bytes, the fragments as they are in global memory: a
//             warp reads 512 consecutive bytes
//   metadata  straight to registers, 16 bytes a lane and row tile for a whole record (two or four
//             stages), one record ahead; the words move down as they are used
//
// Blocks are numbered so that those that run together form a patch of the result, 8 tiles of W
// wide: they share its weights and its x in the L2.
#include "sparse24/gemm_cuda.h"
#include "sparse24/gemm_sm80.cuh"

namespace gossamer::sparse24 {
namespace {

constexpr int kPrefillThreads = 256;
constexpr int kPatchTiles = 8;
constexpr int kRowTiles = 4;                          // of a warp
constexpr int kWarpRows = kRowTiles * kFragmentRows;  // of W
constexpr int kPieces = kPrefillStepBytes / 16;       // of a row of x in a stage
constexpr int kTileBytes = 2 * kFragmentBytes;        // of a row tile in a stage
constexpr int kSumStride = kWarpRows + kSumPadding;

// What a block computes: rows of W up to end_n, all of one group of a convolution, and of x.
struct BlockTile {
  int64_t first_n, end_n, first_m;
  int group;
};

// Rows of x are what has
//
//   kMaySplit                            whether blocks may share a tile along K
//   outputs(tile, index, tile_n, n)      sets the rows of W of the tile of that index
//   Shared<kTileM>                       in shared memory, of a tile
//   Loader<kTileM>(rows, tile, shared, step)  begins with that step
//     load(x, step)                      copies a step of each row: the first, then one by one
//
// They are dealt out to threads by pieces: a thread has the same one of every 32nd row.
struct PieceOfRow {
  static constexpr int kRows = kPrefillThreads / kPieces;
  int row, piece;

  __device__ PieceOfRow()
      : row(static_cast<int>(threadIdx.x) / kPieces),
        piece(static_cast<int>(threadIdx.x) % kPieces) {}
  __device__ uint4* place(uint4* x, int first) const {
    return x + (first + row) * kPieces + (piece ^ (row % 8));
  }
};

template <class Rows>
struct PrefillArgs {
  Epilogue epilogue;
  const char* weights;
  Rows x;
  int row_tiles, records, stages;
  unsigned tiles_n, tiles_m;
  void* workspace;  // where blocks share a tile: [tile][block][register][thread] sums
  int32_t* counters;
};

template <int kWarpsN, int kTokenTiles, class Rows>
struct PrefillTile {
  static constexpr int kWarpsM = kPrefillThreads / kWarp / kWarpsN;
  static constexpr int kN = kWarpsN * kWarpRows, kM = 8 * kTokenTiles * kWarpsM;
  static constexpr int kWeightPieces = kN / kFragmentRows * kTileBytes / 16;  // of a stage
  // A stage is its weights and then its x; at the end, all of it holds the sums.
  static constexpr int kStagePieces = kWeightPieces + kM * kPieces;

  struct Shared : Rows::template Shared<kM> {
    SharedTile<uint4, kPrefillStages * kStagePieces, 128> stages;
  };
  using Loader = typename Rows::template Loader<kM>;
};

template <class Tile, class Rows>
__device__ __forceinline__ BlockTile block_tile(const PrefillArgs<Rows>& args) {
  const unsigned patch = blockIdx.x / (kPatchTiles * args.tiles_m);
  const unsigned within = blockIdx.x % (kPatchTiles * args.tiles_m);
  const unsigned width = min(args.tiles_n - patch * kPatchTiles, unsigned{kPatchTiles});
  BlockTile tile{};
  tile.first_m = int64_t{within / width} * Tile::kM;
  args.x.outputs(tile, patch * kPatchTiles + within % width, Tile::kN, args.epilogue.n);
  return tile;
}

// The stages of a tile that this block multiplies: of whole records.
struct Stages {
  int first, end;
};

template <int kStepsOfRecord, class Rows>
__device__ __forceinline__ Stages stages_of(const PrefillArgs<Rows>& args) {
  if constexpr (!Rows::kMaySplit) return {0, args.stages};
  const auto first_of = [&](unsigned block) {
    const auto record = static_cast<int>(int64_t{args.records} * block / gridDim.y);
    return min(record * kStepsOfRecord, args.stages);
  };
  return {first_of(blockIdx.y), first_of(blockIdx.y + 1)};
}

// Copies the stage `step` of both operands. Rows of x past m and columns past k become zeros; tiles
// past the last one of W are left out, nobody looks at their sums.
template <class T, class Tile, class Rows>
__device__ __forceinline__ void load_stage(const PrefillArgs<Rows>& args,
                                           typename Tile::Shared& shared,
                                           typename Tile::Loader& loader, const BlockTile& tile,
                                           int step, int end) {
  using R = Record<T>;
  constexpr int kStepsOfRecord = R::kSteps / 2;
  if (step < end) {
    uint4* weights = shared.stages.data() + step % kPrefillStages * Tile::kStagePieces;
    const int64_t offset =
        int64_t{step / kStepsOfRecord} * R::kBytes + step % kStepsOfRecord * kTileBytes;
#pragma unroll
    for (int i = threadIdx.x; i < Tile::kWeightPieces; i += kPrefillThreads) {
      const int row_tile = static_cast<int>(tile.first_n / kFragmentRows) + i / (kTileBytes / 16);
      const bool is_inside = row_tile < args.row_tiles;
      const char* from = args.weights +
                         int64_t{is_inside ? row_tile : 0} * args.records * R::kBytes + offset +
                         i % (kTileBytes / 16) * 16;
      ptx::cp_async16(weights + i, from, is_inside ? 16 : 0);
    }
    loader.load(weights + Tile::kWeightPieces, step);
  }
  ptx::cp_async_commit();  // also an empty group: waits count groups
}

// Leaves the sums of a part of K in the workspace; the last of the tile's blocks to do so gets the
// total of all, in the order of K, and true.
template <class Sum, int kTokenTiles, class Rows>
__device__ __forceinline__ bool meet(Sum (&sum)[kRowTiles][kTokenTiles][4],
                                     const PrefillArgs<Rows>& args) {
  constexpr int kSums = kRowTiles * kTokenTiles * 4;  // of a thread
  Sum* of_tile = static_cast<Sum*>(args.workspace) +
                 int64_t{blockIdx.x} * gridDim.y * kSums * kPrefillThreads + threadIdx.x;
  const auto each = [&](unsigned block, const auto& body) {
    Sum* from = of_tile + int64_t{block} * kSums * kPrefillThreads;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      body(sum[i / 4 / kTokenTiles][i / 4 % kTokenTiles][i % 4], from[i * kPrefillThreads]);
    }
  };
  each(blockIdx.y, [](const Sum& mine, Sum& there) { there = mine; });
  __threadfence();  // the sums are there for whoever sees the count
  __syncthreads();
  int32_t* counter = args.counters + blockIdx.x;
  const auto others = static_cast<int32_t>(gridDim.y - 1);
  if (!__syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == others)) return false;
  if (threadIdx.x == 0) *counter = 0;  // for the next launch
  __threadfence();
  each(0, [](Sum& mine, const Sum& there) { mine = there; });
#pragma unroll 1
  for (unsigned block = 1; block < gridDim.y; ++block) {
    each(block, [](Sum& mine, const Sum& there) { mine += there; });
  }
  return true;
}

template <class T, int kWarpsN, int kTokenTiles, class Rows>
__global__ void __launch_bounds__(kPrefillThreads, 1) prefill(const PrefillArgs<Rows> args) {
  using R = Record<T>;
  using Sum = ptx::Accumulator<T>;
  using Tile = PrefillTile<kWarpsN, kTokenTiles, Rows>;
  constexpr int kStepsOfRecord = R::kSteps / 2;
  constexpr int kWords = 4 / kStepsOfRecord;  // of metadata for a stage
  typename Tile::Shared& shared = *shared_memory<typename Tile::Shared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_n = warp % kWarpsN, warp_m = warp / kWarpsN;
  const BlockTile tile = block_tile<Tile>(args);
  const Stages stages = stages_of<kStepsOfRecord>(args);
  typename Tile::Loader loader(args.x, tile, shared, stages.first);

  // Tiles past the last one read its metadata again: there must be some, and it must be legal.
  const char* metadata_of[kRowTiles];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row_tile = static_cast<int>(tile.first_n / kFragmentRows) + warp_n * kRowTiles + i;
    metadata_of[i] =
        args.weights + int64_t{min(row_tile, args.row_tiles - 1)} * args.records * R::kBytes +
        int64_t{stages.first / kStepsOfRecord} * R::kBytes + R::kMetadata + lane * kLaneBytes;
  }
  uint32_t metadata[kRowTiles][4], next_metadata[kRowTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    to_registers(next_metadata[i], ptx::load_nc16(metadata_of[i]));
  }

#pragma unroll
  for (int step = 0; step < kPrefillStages - 1; ++step) {
    load_stage<T, Tile>(args, shared, loader, tile, stages.first + step, stages.end);
  }

  // Lane 8c + r gives ldmatrix row r of a tile of x, piece c of a step's four.
  const int x_row = warp_m * 8 * kTokenTiles + lane % 8;
  Sum sum[kRowTiles][kTokenTiles][4] = {};
  for (int step = stages.first; step < stages.end; ++step) {
    if (step % kStepsOfRecord == 0) {
      const int next = step + kStepsOfRecord;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) metadata[i][j] = next_metadata[i][j];
        if (next < stages.end) {
          metadata_of[i] += R::kBytes;
          to_registers(next_metadata[i], ptx::load_nc16(metadata_of[i]));
        }
      }
    }
    ptx::cp_async_wait<kPrefillStages - 2>();
    __syncthreads();  // this stage is there, and nobody reads the one before it any more
    load_stage<T, Tile>(args, shared, loader, tile, step + kPrefillStages - 1, stages.end);

    const uint4* stage = shared.stages.data() + step % kPrefillStages * Tile::kStagePieces;
    const uint4* weights = stage + warp_n * kRowTiles * 2 * kWarp + lane;
    const uint4* x = stage + Tile::kWeightPieces + x_row * kPieces;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        to_registers(a[i], weights[(2 * i + half) * kWarp]);
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        uint32_t b[4];
        ptx::ldmatrix(b, x + 8 * j * kPieces + ((4 * half + lane / 8) ^ (lane % 8)));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_step<T>(sum[i][j], a[i], b, metadata[i][metadata_word<T>(half)], half);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j + kWords < 4; ++j) metadata[i][j] = metadata[i][j + kWords];
    }
  }

  // Through shared memory from fragments, where a lane's rows of W lie 8 apart, to runs of rows;
  // each warp in a part of its own.
  ptx::cp_async_wait<0>();
  __syncthreads();
  if constexpr (Rows::kMaySplit) {
    if (gridDim.y > 1 && !meet(sum, args)) return;
  }
  constexpr int kSums = 8 * kTokenTiles * kSumStride;  // of a warp
  static_assert(kSums * 4 * (kPrefillThreads / kWarp) <= kPrefillStages * Tile::kStagePieces * 16);
  Sum* sums = reinterpret_cast<Sum*>(shared.stages.data()) + warp * kSums;
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[(8 * j + lane % 4 * 2 + r % 2) * kSumStride + kFragmentRows * i + lane / 4 +
             r / 2 * 8] = sum[i][j][r];
      }
    }
  }
  __syncwarp();
  constexpr int kRuns = kWarpRows / kRun;
  const int64_t first_token = tile.first_m + warp_m * 8 * kTokenTiles;
  const int64_t row = tile.first_n + warp_n * kWarpRows + lane % kRuns * kRun;
  const auto tokens =
      static_cast<int>(min(args.epilogue.m - first_token, int64_t{8 * kTokenTiles}));
  if (row >= tile.end_n) return;
  const RowTerms terms = row_terms(args.epilogue, row);
#pragma unroll 1
  for (int token = lane / kRuns; token < tokens; token += kWarp / kRuns) {
    Sum run[kRun];
    load_run(run, sums + token * kSumStride + lane % kRuns * kRun);
    finish_run(args.epilogue, terms, first_token + token, row, run);
  }
}

template <class T, int kWarpsN, int kTokenTiles, class Rows>
void launch_prefill(const CudaGemmArgs& args, const Rows& x, int64_t tiles_n, cudaStream_t stream) {
  using Tile = PrefillTile<kWarpsN, kTokenTiles, Rows>;
  check_architecture<T>(prefill<T, kWarpsN, kTokenTiles, Rows>);
  const int64_t tiles_m = ceil_div(args.m, Tile::kM);
  const PrefillArgs<Rows> prefill_args{
      epilogue_of(args),
      reinterpret_cast<const char*>(args.panels),
      x,
      static_cast<int>(ceil_div(args.n, kFragmentRows)),
      static_cast<int>(ceil_div(args.k, kFragmentColumns)),
      static_cast<int>(ceil_div(args.k * size_of(args.dtype), kPrefillStepBytes)),
      static_cast<unsigned>(tiles_n),
      static_cast<unsigned>(tiles_m),
      args.workspace,
      args.counters,
  };
  const dim3 grid(static_cast<unsigned>(tiles_n * tiles_m),
                  static_cast<unsigned>(args.config.split_k));
  launch(prefill<T, kWarpsN, kTokenTiles, Rows>, grid, kPrefillThreads,
         sizeof(typename Tile::Shared), stream, prefill_args);
}

}  // namespace
}  // namespace gossamer::sparse24
