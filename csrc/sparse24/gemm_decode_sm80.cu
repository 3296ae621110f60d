// 2:4 GEMM for few rows of x, at most 64:
//
//   y[m,n] = act(x_scale[m] * row_scale[n] * sum_k x[m,k] W[n,k] + b[n])
//
// Each weight is used for a handful of rows only, so the time is that of reading the weights from
// DRAM once, and everything serves to keep those reads going: at 36 GB/s a multiprocessor (H200)
// and about 0.9 us of latency under load, 32 KB must be on their way all the time.
//
//   weights   global memory -> registers, in fragment order: 16 bytes a lane are the A operand of a
//             step. The registers of a step are refilled from the warp's next record as soon as its
//             products are issued, so each warp has a whole record (4.5 KB; 8-bit: 2.5 KB) on its
//             way, 8 or 16 warps of a multiprocessor 36 to 73 KB.
//   x         global memory (mostly L2) -> shared memory by cp.async, three stages; read as the B
//             operand by ldmatrix. Only the m rows there are: the rows of a tile of 8 past the last
//             one read that one again, and nobody looks at those columns of D.
//
// A block has 8 warps. Along n each has 16 rows of W (32 when there are 64 rows of x); the warps_k
// warps that share those rows take every warps_k-th record:
//
//               record 0   record 1   record 2   record 3   ...        warps_k = 2
//   rows  0-15 [ warp 0  |  warp 1  |  warp 0  |  warp 1  |
//   rows 16-31 [ warp 2  |  warp 3  |  warp 2  |  warp 3  |
//
// and with split_k > 1 several blocks share the rows, each with consecutive records. All sums are
// added in a fixed order: the same operands give the same bits in every run.
//
// A stage of x, in 16-byte pieces: row r of x has a slice for each warp along K, of what that warp
// multiplies with its records: a part of one or up to four. Piece p of the row lies at p xor (r mod
// 8), so that the eight rows ldmatrix reads at one p, whose distance is a multiple of 128 bytes,
// lie in different banks.
//
//   row 0  | slice of warp 0's records | slice of warp 1's records | ...
//   row 1  |                           |                           | ...
#include "sparse24/gemm_cuda.h"
#include "sparse24/gemm_sm80.cuh"

namespace gossamer::sparse24 {
namespace {

constexpr int kDecodeThreadsShift = 8;
constexpr int kDecodeThreads = 1 << kDecodeThreadsShift;
static_assert(kDecodeThreads == kDecodeWarps * kWarp);

struct DecodeArgs {
  Epilogue epilogue;
  const char *weights, *x;
  int64_t x_stride;  // bytes
  int64_t x_bytes;   // of a row
  int m, row_tiles, records;
  int warps_k, split_k;
  int row_shift, slice_shift;  // log2 of the 16-byte pieces of a row of a stage, and of a slice
  void* workspace;
  int32_t* counters;
};

// The x that a block multiplies, stage after stage.
struct XStages {
  unsigned char* shared;
  int first_record;
  int64_t end;  // bytes of a row that this block needs
  int count;    // stages in all

  __device__ unsigned char* at(const DecodeArgs& args, int stage) const {
    return shared + (stage % kDecodeStages) * (args.m << args.row_shift) * 16;
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
        const char* from = args.x + (valid > 0 ? column : 0);
        for (int row = threadIdx.x >> pass_shift; row < args.m;
             row += kDecodeThreads >> pass_shift) {
          ptx::cp_async16(to + ((row << args.row_shift) + (piece ^ (row % 8))) * 16,
                          from + row * args.x_stride, valid);
        }
      }
    }
    ptx::cp_async_commit();  // also an empty group: waits count groups
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

// Finishes the block's tile from the sums of its warps along K, or, with split_k > 1, leaves their
// total in the workspace, where the last block of the tile to arrive finishes it from all blocks'.
template <class Sum>
__device__ __forceinline__ void finish_tile(const DecodeArgs& args, Parts<Sum> parts, int tile_n) {
  const int64_t first_row = int64_t{blockIdx.x} * tile_n;
  const int runs = tile_n / kRun;
  // Of those runs that begin before row n.
  const auto for_each_run = [&](const auto& visit) {
    const auto rows = static_cast<int>(min(args.epilogue.n - first_row, int64_t{tile_n}));
    for (int i = threadIdx.x; i < args.m * runs; i += kDecodeThreads) {
      const int token = i / runs, row = i % runs * kRun;
      if (row < rows) visit(token, row);
    }
  };
  if (args.split_k > 1) {
    Sum* of_tile =
        static_cast<Sum*>(args.workspace) + int64_t{blockIdx.x} * args.split_k * args.m * tile_n;
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
    finish_run(args.epilogue, row_terms(args.epilogue, first_row + row), token, first_row + row,
               run);
  });
}

// 16 bytes of weights, which nobody reads again.
__device__ __forceinline__ void load_weights(uint32_t (&registers)[4], const char* global,
                                             uint64_t evict_first) {
  to_registers(registers, ptx::load_nc16_hint(global, evict_first));
}

// With 64 rows of x a warp's sums and two records take about 230 registers: one block is resident,
// and the second row tile keeps as many bytes on their way as a second block would.
template <class T, int kTokenTiles, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, kTokenTiles == 8 ? 1 : 2)
    decode(const DecodeArgs args) {
  using R = Record<T>;
  using Sum = ptx::Accumulator<T>;
  constexpr int kTileM = 8 * kTokenTiles;
  constexpr int kPairs = R::kSteps / 2;  // of steps: 128 bytes of x, the least that a slice has
  unsigned char* shared = shared_memory<unsigned char>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_k = warp % args.warps_k, warp_n = warp / args.warps_k;
  const int warps_n = kDecodeWarps / args.warps_k;

  const int begin = static_cast<int>(int64_t{args.records} * blockIdx.y / args.split_k);
  const int end = static_cast<int>(int64_t{args.records} * (blockIdx.y + 1) / args.split_k);
  const int rounds = (end - begin + args.warps_k - 1) / args.warps_k;
  const int pairs_per_slice = 1 << (args.slice_shift - 3);
  const XStages stages{shared, begin, min(args.x_bytes, int64_t{end} * R::kXBytes),
                       (rounds * kPairs + pairs_per_slice - 1) / pairs_per_slice};

  // Rows past the last tile of W: a warp that has none does nothing, a second tile that is not
  // there is the last one again.
  const int tile = (static_cast<int>(blockIdx.x) * warps_n + warp_n) * kRowTiles;
  const int last = tile < args.row_tiles ? end : begin;
  int record = begin + warp_k;
  const uint64_t evict_first = ptx::l2_evict_first();
  const char* weights[kRowTiles];
  uint32_t a[kRowTiles][R::kSteps][4], metadata[kRowTiles][4], next_metadata[kRowTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    weights[i] = args.weights +
                 (int64_t{min(tile + i, args.row_tiles - 1)} * args.records + record) * R::kBytes +
                 lane * kLaneBytes;
    if (record < last) {
      load_weights(metadata[i], weights[i] + R::kMetadata, evict_first);
#pragma unroll
      for (int step = 0; step < R::kSteps; ++step) {
        load_weights(a[i][step], weights[i] + step * kFragmentBytes, evict_first);
      }
    }
  }

#pragma unroll
  for (int stage = 0; stage < kDecodeStages - 1; ++stage) stages.load<T>(args, stage);

  // Lane 8c + r gives ldmatrix row r of a tile of x, piece c of a step's four. An odd step is 64
  // bytes on, in the swizzled piece the same as an xor with 64.
  int x_offset[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int row = min(8 * j + lane % 8, args.m - 1);
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
    if (has_next) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        weights[i] += args.warps_k * R::kBytes;
        load_weights(next_metadata[i], weights[i] + R::kMetadata, evict_first);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int pair_of_slice = (round * kPairs + pair) & (pairs_per_slice - 1);
      if (pair_of_slice == 0) {
        ptx::cp_async_wait<kDecodeStages - 2>();
        __syncthreads();  // this stage is there, and nobody reads the one before it any more
        stages.load<T>(args, stage + kDecodeStages - 1);
        x = stages.at(args, stage++);
      }
      if (!is_active) continue;
#pragma unroll
      for (int step = 2 * pair; step < 2 * pair + 2; ++step) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t b[4];
          ptx::ldmatrix(b, x + (x_offset[j] ^ (step % 2 * kStepBytes)) + pair_of_slice * 128);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply_step<T>(sum[i][j], a[i][step], b, metadata[i][metadata_word<T>(step)], step);
          }
        }
        if (has_next) {
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            load_weights(a[i][step], weights[i] + step * kFragmentBytes, evict_first);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) metadata[i][j] = next_metadata[i][j];
    }
  }

  // From fragments, where a lane's rows of W lie 8 apart, to rows of sums.
  ptx::cp_async_wait<0>();
  __syncthreads();
  Sum* sums = reinterpret_cast<Sum*>(shared);
  const int tile_n = warps_n * kRowTiles * kFragmentRows;
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
  finish_tile<Sum>(args, {sums, args.warps_k, kTileM * stride, stride}, tile_n);
}

int log2_of(int64_t power_of_two) {
  int shift = 0;
  while (int64_t{1} << shift < power_of_two) ++shift;
  return shift;
}

template <class T, int kTokenTiles>
void launch_decode(const CudaGemmArgs& args, cudaStream_t stream) {
  const auto kernel = decode<T, kTokenTiles, decode_row_tiles(8 * kTokenTiles)>;
  check_architecture<T>(kernel);
  const CudaGemmConfig& config = args.config;
  const int64_t size = size_of(args.dtype);
  const int slice_pieces = decode_slice_bytes(args.m, args.dtype, config.warps_k) / 16;
  const DecodeArgs decode_args{
      epilogue_of(args),
      reinterpret_cast<const char*>(args.panels),
      static_cast<const char*>(args.x),
      args.x_stride * size,
      args.k * size,
      static_cast<int>(args.m),
      static_cast<int>(cuda_ceil_div(args.n, kFragmentRows)),
      static_cast<int>(cuda_ceil_div(args.k, kFragmentColumns)),
      config.warps_k,
      config.split_k,
      log2_of(slice_pieces * config.warps_k),
      log2_of(slice_pieces),
      args.workspace,
      args.counters,
  };
  const dim3 grid(static_cast<unsigned>(cuda_ceil_div(args.n, config.tile_n)),
                  static_cast<unsigned>(config.split_k));
  const int64_t shared = decode_shared_bytes(args.m, args.dtype, config.tile_m, config.warps_k);
  launch(kernel, grid, kDecodeThreads, static_cast<size_t>(shared), stream, decode_args);
}

}  // namespace

void gemm_decode_sm80(const CudaGemmArgs& args, cudaStream_t stream) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (args.config.tile_m) {
      case 8: return launch_decode<T, 1>(args, stream);
      case 16: return launch_decode<T, 2>(args, stream);
      case 32: return launch_decode<T, 4>(args, stream);
      default: return launch_decode<T, 8>(args, stream);
    }
  });
}

}  // namespace gossamer::sparse24
