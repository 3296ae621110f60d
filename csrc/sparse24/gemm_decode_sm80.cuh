#pragma once
// 2:4 GEMM for few rows of x, at most 64 (of weights of the type of x: gemm_decode_sm80.cu; of int4
// weights: gemm_int4_sm80.cu, which says what is different there):
//
//   y[m,n] = act(x_scale[m] * row_scale[n] * sum_k x[m,k] W[n,k] + b[n])
//
// Each weight is used for a handful of rows only, so the time is that of reading the weights from
// DRAM once, and everything serves to keep those reads going: at 36 GB/s a multiprocessor (H200)
// and about 0.9 us of latency under load, 32 KB must be on their way all the time.
//
//   weights   global memory -> registers, in fragment order: 16 bytes a lane are the A operand of a
//             step. The registers are refilled from the warp's next record as soon as their
//             products are issued, so each warp has a whole record (4.5 KB; 8-bit: 2.5 KB) on its
//             way, 8 or 16 warps of a multiprocessor 20 to 73 KB. int4 weights go through shared
//             memory, a ring for each warp, by cp.async.
//   x         global memory (mostly L2) -> shared memory by cp.async, three stages; read as the B
//             operand by ldmatrix. Only the m rows there are: the rows of a tile of 8 past the last
//             one read that one again, and nobody looks at those columns of D.
//
// A block has 8 warps. Along n each has 16 rows of W (32 when there are 64 rows of x, 32 or 48
// with int4 weights); the warps_k warps that share those rows take every warps_k-th record:
//
//               record 0   record 1   record 2   record 3   ...        warps_k = 2
//   rows  0-15 [ warp 0  |  warp 1  |  warp 0  |  warp 1  |
//   rows 16-31 [ warp 2  |  warp 3  |  warp 2  |  warp 3  |
//
// and with split_k > 1 several blocks share the rows, each with consecutive records. All sums are
// added in a fixed order: the same operands give the same bits in every run.
//
// More rows of x than a tile has (int4 only) take several blocks. Those that read the same weights
// are neighbours in the grid, so that all but the first find them in the L2. That is not tuned.
//
// A stage of x, in 16-byte pieces: row r of x has a slice for each warp along K, of what that warp
// multiplies with its records: a part of one or up to four. A warp consumes it in chunks of two
// steps (int4: four). Piece p of the row lies at p xor (r mod 8), so that the eight rows ldmatrix
// reads at one p, whose distance is a multiple of 128 bytes, lie in different banks.
//
//   row 0  | slice of warp 0's records | slice of warp 1's records | ...
//   row 1  |                           |                           | ...
#include "sparse24/gemm_cuda.h"
#include "sparse24/gemm_sm80.cuh"
#include "sparse24/group_scales.h"

namespace gossamer::sparse24 {

constexpr int kDecodeThreadsShift = 8;
constexpr int kDecodeThreads = 1 << kDecodeThreadsShift;
static_assert(kDecodeThreads == kDecodeWarps * kWarp);

struct DecodeArgs {
  Epilogue epilogue;
  GroupScales groups;
  const char *weights, *x;
  int64_t x_stride;    // bytes
  int64_t x_bytes;     // of a row
  int m, token_tiles;  // rows of x, and tiles of them
  int row_tiles, records;
  int warps_k, split_k;
  int row_shift, slice_shift;  // log2 of the 16-byte pieces of a row of a stage, and of a slice
  int ring;                    // bytes of shared memory before the warps' rings of int4 weights
  void* workspace;
  int32_t* counters;
};

// The x that a block multiplies, stage after stage.
struct XStages {
  unsigned char* shared;
  const char* x;  // of its first row
  int m;          // its rows
  int first_record;
  int64_t end;  // bytes of a row that this block needs
  int count;    // stages in all

  __device__ unsigned char* at(const DecodeArgs& args, int stage) const {
    return shared + (stage % kDecodeStages) * (m << args.row_shift) * 16;
  }

  template <class T>
  __device__ void load(const DecodeArgs& args, int stage) const {
    if (stage < count) {
      constexpr int kPieces = Record<T>::kXBytes / 16;  // for a record
      unsigned char* to = at(args, stage);
      // All are powers of two, so a thread copies the same pieces of several rows.
      const int pass_shift = min(args.row_shift, kDecodeThreadsShift);
      for (int piece = threadIdx.x & ((1 << pass_shift) - 1); piece < 1 << args.row_shift;
           piece += kDecodeThreads) {
        const int warp_k = piece >> args.slice_shift;
        const int place =  // in what this warp multiplies
            (stage << args.slice_shift) + (piece & ((1 << args.slice_shift) - 1));
        const int64_t record = first_record + place / kPieces * args.warps_k + warp_k;
        const int64_t column = (record * kPieces + place % kPieces) * 16;
        const auto valid = static_cast<int>(min(max(end - column, int64_t{0}), int64_t{16}));
        const char* from = x + (valid > 0 ? column : 0);
        for (int row = threadIdx.x >> pass_shift; row < m; row += kDecodeThreads >> pass_shift) {
          ptx::cp_async16(to + ((row << args.row_shift) + (piece ^ (row % 8))) * 16,
                          from + row * args.x_stride, valid);
        }
      }
    }
  }
};

// Partial sums of a tile as [part][row of x][row of W], which are added in the order of the parts.
template <class Sum>
struct Parts {
  const Sum* sums;
  int count;
  int part_stride, stride;  // between parts and between rows of x

  __device__ void total(Sum (&run)[kRun], int token, int row) const {
    const Sum* from = sums + token * stride + row;
    load_run(run, from);
#pragma unroll 4
    for (int part = 1; part < count; ++part) {
      Sum more[kRun];
      load_run(more, from + int64_t{part} * part_stride);
#pragma unroll
      for (int r = 0; r < kRun; ++r) run[r] += more[r];
    }
  }
};

// The outputs of a block.
struct Place {
  int64_t first_row;  // of W
  int tile_n;
  int first_token, m;  // rows of x
};

// Finishes the block's tile from the sums of its warps along K, or, with split_k > 1, leaves their
// total in the workspace, where the last block of the tile to arrive finishes it from all blocks'.
template <class Sum>
__device__ __forceinline__ void finish_tile(const DecodeArgs& args, Parts<Sum> parts,
                                            const Place& place) {
  const int tile_n = place.tile_n, runs = tile_n / kRun;
  // Of those runs that begin before row n.
  const auto for_each_run = [&](const auto& visit) {
    const auto rows = static_cast<int>(min(args.epilogue.n - place.first_row, int64_t{tile_n}));
    for (int i = threadIdx.x; i < place.m * runs; i += kDecodeThreads) {
      const int token = i / runs, row = i % runs * kRun;
      if (row < rows) visit(token, row);
    }
  };
  if (args.split_k > 1) {
    // Of this block's first row of x; another block along K begins m rows of x further on.
    Sum* of_tile = static_cast<Sum*>(args.workspace) + place.first_row * args.split_k * args.m +
                   place.first_token * tile_n;
    for_each_run([&](int token, int row) {
      Sum run[kRun];
      parts.total(run, token, row);
      store_run(of_tile + (int64_t{blockIdx.y} * args.m + token) * tile_n + row, run);
    });
    __threadfence();  // the sums are there for whoever sees the count
    __syncthreads();
    int32_t* counter = args.counters + blockIdx.x;
    const bool is_last =
        __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == args.split_k - 1);
    if (!is_last) return;
    if (threadIdx.x == 0) *counter = 0;  // for the next launch
    __threadfence();
    parts = {of_tile, args.split_k, args.m * tile_n, tile_n};
  }
  for_each_run([&](int token, int row) {
    Sum run[kRun];
    parts.total(run, token, row);
    const int64_t n = place.first_row + row;
    finish_run(args.epilogue, row_terms(args.epilogue, n), place.first_token + token, n, run);
  });
}

// 16 bytes of weights, which nobody reads again.
__device__ __forceinline__ void load_weights(uint32_t (&registers)[4], const char* global,
                                             uint64_t evict_first) {
  to_registers(registers, ptx::load_nc16_hint(global, evict_first));
}

// This lane's bytes in the first piece of a record. A tile past the last one is that again: its
// sums go nowhere.
__device__ __forceinline__ const char* lane_record(const DecodeArgs& args, int tile, int record,
                                                   int record_bytes) {
  const int64_t existing = min(tile, args.row_tiles - 1);
  return args.weights + (existing * args.records + record) * record_bytes +
         threadIdx.x % kWarp * kLaneBytes;
}

template <class T, int N, int M>
__device__ __forceinline__ void copy(T (&to)[N][M], const T (&from)[N][M]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < M; ++j) to[i][j] = from[i][j];
  }
}

// What a kernel does with its weights. A warp's are those of kRowTiles tiles of 16 rows, a record
// of each in registers:
//
//   using X, Sum               the types of x and of the sums
//   kType                      the weights', for gemm_cuda_config.h
//   kRowTiles, kChunkSteps     steps are multiplied in chunks of so many
//   kAhead                     chunks that are asked for before they are multiplied; 0: a record,
//                              in registers
//   kRingBytes                 of shared memory for a warp's weights
//   Weights(args, tile, record, last, ring)   of the records from `record` on, before `last`;
//                              `ring`: the warp's shared memory
//   advance(record)            kAhead = 0: starts to load the next record
//   load(chunk)                otherwise: asks for that chunk of the record that is `kAhead` ahead
//   multiply(sum, chunk, load_x, has_next)   sum += the products of a chunk; load_x(b, j, step)
//                              brings the B operand of tile j of x. kAhead = 0: then refills the
//                              registers from the next record
//   rotate()                   to the next record
//
// Waits count groups of cp.async, of which all threads make as many, some of them empty: one for
// each stage of x; or, where weights are among them, one for each chunk, with the stage of x that
// is asked for in the same turn.
template <class Weights, int kTokenTiles>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks(8 * kTokenTiles, Weights::kType))
    decode(const DecodeArgs args) {
  using X = typename Weights::X;
  using Sum = typename Weights::Sum;
  constexpr int kRowTiles = Weights::kRowTiles;
  constexpr int kTileM = 8 * kTokenTiles;
  constexpr int kChunks = Record<X>::kSteps / Weights::kChunkSteps;
  constexpr int kChunkBytes = Weights::kChunkSteps * kStepBytes;  // of a row of x
  constexpr int kAhead = Weights::kAhead;
  static_assert(kAhead % kChunks == 0);
  unsigned char* shared = shared_memory<unsigned char>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_k = warp % args.warps_k, warp_n = warp / args.warps_k;
  const int warps_n = kDecodeWarps / args.warps_k;
  const int tile_n = warps_n * kRowTiles * kFragmentRows;
  const int block_n = static_cast<int>(blockIdx.x) / args.token_tiles;
  const int first_token = static_cast<int>(blockIdx.x) % args.token_tiles * kTileM;
  const int m = min(args.m - first_token, kTileM);

  const int block_k = static_cast<int>(blockIdx.y);
  const int depth = args.records / args.split_k, deeper = args.records % args.split_k;
  const int begin = block_k * depth + min(block_k, deeper);
  const int end = begin + depth + (block_k < deeper ? 1 : 0);
  const int rounds = (end - begin + args.warps_k - 1) / args.warps_k;
  const int chunks_per_slice = (1 << args.slice_shift) / (kChunkBytes / 16);
  const XStages stages{shared,
                       args.x + first_token * args.x_stride,
                       m,
                       begin,
                       min(args.x_bytes, int64_t{end} * Record<X>::kXBytes),
                       (rounds * kChunks + chunks_per_slice - 1) / chunks_per_slice};

  // Rows past the last tile of W: a warp that has none does nothing.
  const int tile = (block_n * warps_n + warp_n) * kRowTiles;
  const int last = tile < args.row_tiles ? end : begin;
  int record = begin + warp_k;
  Weights weights(args, tile, record, last, shared + args.ring + warp * Weights::kRingBytes);
  if constexpr (kAhead > 0) weights.load(0);
#pragma unroll
  for (int stage = 0; stage < kDecodeStages - 1; ++stage) {
    stages.load<X>(args, stage);
    if constexpr (kAhead == 0) ptx::cp_async_commit();
  }
  if constexpr (kAhead > 0) {
#pragma unroll
    for (int i = 1; i <= kAhead; ++i) {
      ptx::cp_async_commit();
      if (i % kChunks == 0) weights.rotate();
      if (i < kAhead) weights.load(i % kChunks);
    }
  }

  // Lane 8c + r gives ldmatrix row r of a tile of x, piece c of a step's four. An odd step is 64
  // bytes on, in the swizzled piece the same as an xor with 64.
  int x_offset[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int row = min(8 * j + lane % 8, m - 1);
    x_offset[j] =
        ((row << args.row_shift) + (warp_k << args.slice_shift) + ((lane / 8) ^ (row % 8))) * 16;
  }

  Sum sum[kRowTiles][kTokenTiles][4] = {};
  int stage = 0;
  const unsigned char* x = shared;
  for (int round = 0; round < rounds; ++round) {
    const bool is_active = record < last;
    record += args.warps_k;
    const bool has_next = record < last;
    if constexpr (kAhead == 0) {
      if (has_next) weights.advance(record);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int chunk_of_slice = (round * kChunks + chunk) & (chunks_per_slice - 1);
      if constexpr (kAhead > 0) ptx::cp_async_wait<kAhead - 1>();
      if (chunk_of_slice == 0) {
        if constexpr (kAhead == 0) ptx::cp_async_wait<kDecodeStages - 2>();
        __syncthreads();  // this stage is there, and nobody reads the one before it any more
        stages.load<X>(args, stage + kDecodeStages - 1);
        if constexpr (kAhead == 0) ptx::cp_async_commit();
        x = stages.at(args, stage++);
      }
      const unsigned char* of_chunk = x + chunk_of_slice * kChunkBytes;
      const auto load_x = [&](uint32_t (&b)[4], int j, int step) {
        ptx::ldmatrix(
            b, of_chunk + (x_offset[j] ^ (step % 2 * kStepBytes)) + step / 2 * 2 * kStepBytes);
      };
      if (is_active) weights.multiply(sum, chunk, load_x, has_next);
      if constexpr (kAhead > 0) {
        weights.load(chunk);
        ptx::cp_async_commit();
      }
    }
    weights.rotate();
  }

  // From fragments, where a lane's rows of W lie 8 apart, to rows of sums.
  ptx::cp_async_wait<0>();
  __syncthreads();
  Sum* sums = reinterpret_cast<Sum*>(shared);
  const int stride = tile_n + kSumPadding;
  Sum* own = sums + (warp_k * kTileM + lane % 4 * 2) * stride + warp_n * kRowTiles * kFragmentRows +
             lane / 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        own[(8 * j + r % 2) * stride + kFragmentRows * i + r / 2 * 8] = sum[i][j][r];
      }
    }
  }
  __syncthreads();
  finish_tile<Sum>(args, {sums, args.warps_k, kTileM * stride, stride},
                   {int64_t{block_n} * tile_n, tile_n, first_token, m});
}

inline int log2_of(int64_t power_of_two) {
  int shift = 0;
  while (int64_t{1} << shift < power_of_two) ++shift;
  return shift;
}

template <class Weights, int kTokenTiles>
void launch_decode(const CudaGemmArgs& args, const GroupScales& groups, cudaStream_t stream) {
  const auto kernel = decode<Weights, kTokenTiles>;
  check_architecture<typename Weights::X>(kernel);
  const CudaGemmConfig& config = args.config;
  const DType weights = args.group > 0 ? DType::kUInt8 : args.dtype;
  const int64_t size = size_of(args.dtype), m = std::min<int64_t>(args.m, config.tile_m);
  const int64_t token_tiles = ceil_div(args.m, config.tile_m);
  const int slice_pieces = decode_slice_bytes(m, weights, config.warps_k) / 16;
  const int64_t shared = decode_shared_bytes(m, weights, config.tile_m, config.warps_k);
  const DecodeArgs decode_args{
      epilogue_of(args),
      groups,
      reinterpret_cast<const char*>(args.panels),
      static_cast<const char*>(args.x),
      args.x_stride * size,
      args.k * size,
      static_cast<int>(args.m),
      static_cast<int>(token_tiles),
      static_cast<int>(ceil_div(args.n, kFragmentRows)),
      static_cast<int>(ceil_div(args.k, kFragmentColumns)),
      config.warps_k,
      config.split_k,
      log2_of(slice_pieces * config.warps_k),
      log2_of(slice_pieces),
      static_cast<int>(shared - decode_ring_bytes(config.tile_m, weights)),
      args.workspace,
      args.counters,
  };
  const dim3 grid(static_cast<unsigned>(ceil_div(args.n, config.tile_n) * token_tiles),
                  static_cast<unsigned>(config.split_k));
  launch(kernel, grid, kDecodeThreads, static_cast<size_t>(shared), stream, decode_args);
}

// Weights<kTokenTiles> for the tile of x that the config says.
template <template <int> class Weights>
void launch_decode_of(const CudaGemmArgs& args, const GroupScales& groups, cudaStream_t stream) {
  switch (args.config.tile_m) {
    case 8: return launch_decode<Weights<1>, 1>(args, groups, stream);
    case 16: return launch_decode<Weights<2>, 2>(args, groups, stream);
    case 32: return launch_decode<Weights<4>, 4>(args, groups, stream);
    default: return launch_decode<Weights<8>, 8>(args, groups, stream);
  }
}

}  // namespace gossamer::sparse24
