// The decode kernel (gemm_decode_sm80.cuh) for int4 weights, of which 16-bit floats are made on the
// way to mma.sp, with one scale for each `group` columns of a row:
//
//   y[m,n] = act(sum_q row_scales[n,q] * (sum_{k in group q} x[m,k] v[n,k]) + b[n]),   v in -7 .. 7
//
// A chunk is four steps, 128 columns: 16 bytes a lane and row tile. For each tile of x the tensor
// cores sum the products of a unit, from 0, in a fragment of its own. A fused multiply-add with the
// scales of the lane's rows g and g + 8 adds that to the running sums, units in increasing order;
// what warps and blocks along K have is then added in their order.
//
//   chunk   [ step 0 | step 1 | step 2 | step 3 ]
//   units   [      4 steps = 128 columns        ]   groups of a multiple of 128 columns, and one
//                                                   scale a row: a group that does not end
//           [ 1 step |        |        |        ]   other multiples of 32
//
// The scales of a chunk are refilled with its weights. A quad needs those of its rows g and g + 8
// for one unit, or four: lane 4g + t holds those of row g + 8 (t / 2), of the first two of four
// units (t even) or the last two (t odd), and gives them to the others by shuffles.
//
// What the arithmetic may cost: at 4.8 TB/s, 132 multiprocessors and 1.7 GHz (H200) each gets 21
// bytes a cycle. A step of a row tile, 256 weights kept, is 192 bytes with its metadata: 9 cycles,
// in which the four schedulers issue 36 instructions of a warp. To widen its word takes 11: three
// SHF and four LOP3, at half rate 14 of the 36 cycles, and four HFMA2. With 8 rows of x and units
// of four steps the loop has 24 instructions beside the product, with all addresses, shuffles and
// loads, and 26 with 16 rows; units of one step, 32, for which the scales of groups of 32 columns
// make it 12 cycles. Shared memory gives x at 128 bytes a cycle: 4 cycles a step for 8 rows of x,
// by two row tiles 2 of the 9. So up to 16 rows the DRAM sets the pace, at 32 (three tiles: 5 of 9)
// it should, and at 64 (16 of 9) it is x.
#include "sparse24/gemm_decode_sm80.cuh"
#include "sparse24/int4.cuh"

namespace gossamer::sparse24 {
namespace {

template <class T, int kUnitSteps, int kTokenTiles>
struct Int4Weights {
  using X = T;
  using Sum = float;
  static constexpr DType kType = DType::kUInt8;
  static constexpr int kRowTiles = decode_row_tiles(8 * kTokenTiles, kType);
  static constexpr int kTileRows = kRowTiles * kFragmentRows;
  static constexpr int kChunkSteps = 4;
  static constexpr int kSteps = Record<T>::kSteps, kChunks = kSteps / kChunkSteps;
  static constexpr int kMetadata = kChunks * kFragmentBytes;
  static constexpr int kBytes = kMetadata + kFragmentBytes;
  static constexpr int kChunkUnits = kChunkSteps / kUnitSteps;
  static constexpr int kHeld = (kChunkUnits + 1) / 2;  // a lane's scales of a chunk and row tile

  const DecodeArgs& args;
  const int tiles_after;   // that exist
  const char* next;        // the record that is loaded, of the first tile at this lane's bytes
  const float* scales;     // of the first row of the first tile, which the others count from
  int held_row, last_row;  // the one of that tile whose scales this lane holds; the last one
  const uint64_t evict_first;
  int next_record;
  uint32_t words[kRowTiles][kChunks][4], metadata[kRowTiles][4], next_metadata[kRowTiles][4];
  float held[kRowTiles][kChunks][kHeld];

  __device__ __forceinline__ Int4Weights(const DecodeArgs& args, int tile, int record, bool exists)
      : args(args),
        tiles_after(max(args.row_tiles - 1 - tile, 0)),
        next(lane_record(args, tile, record, kBytes)),
        evict_first(ptx::l2_evict_first()),
        next_record(record) {
    const int64_t first = int64_t{min(tile, args.row_tiles - 1)} * kFragmentRows;
    scales = args.groups.scales + first * args.groups.columns;
    held_row = threadIdx.x % kWarp / 4 + threadIdx.x % 4 / 2 * 8;
    last_row = static_cast<int>(min(args.epilogue.n - 1 - first, int64_t{kTileRows - 1}));
    if (exists) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_piece(metadata[i], i, kChunks);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) load_piece(words[i][chunk], i, chunk);
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) load_scales(chunk, exists);
  }

  __device__ __forceinline__ void advance(int record) {
    next += args.warps_k * kBytes;
    next_record = record;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_piece(next_metadata[i], i, kChunks);
  }

  template <class LoadX>
  __device__ __forceinline__ void multiply(float (&sum)[kRowTiles][kTokenTiles][4], int chunk,
                                           const LoadX& load_x, bool has_next) {
#pragma unroll
    for (int unit = 0; unit < kChunkUnits; ++unit) {
      // Or the compiler widens all units at once, and has too few registers.
      if (unit > 0) __syncwarp();
      float part[kRowTiles][kTokenTiles][4] = {};
      float scale[kRowTiles][2];  // of rows g and g + 8
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[i][half] = unit_scale(i, chunk, unit, half);
      }
#pragma unroll
      for (int s = 0; s < kUnitSteps; ++s) {
        const int step_of_chunk = unit * kUnitSteps + s, step = chunk * kChunkSteps + step_of_chunk;
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) widen<T>(a[i], words[i][chunk][step_of_chunk]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t b[4];
          load_x(b, j, step_of_chunk);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply_step<T>(part[i][j], a[i], b, metadata[i][metadata_word<T>(step)], step);
            if (s < kUnitSteps - 1) continue;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              sum[i][j][r] = __fmaf_rn(part[i][j][r], scale[i][r / 2], sum[i][j][r]);
            }
          }
        }
      }
    }
    if (!has_next) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_piece(words[i][chunk], i, chunk);
    load_scales(chunk, true);
  }

  __device__ __forceinline__ void rotate() { copy(metadata, next_metadata); }

 private:
  __device__ __forceinline__ void load_piece(uint32_t (&registers)[4], int i, int piece) const {
    // A tile past the last one is that again: its sums go nowhere.
    const auto tile_bytes = static_cast<uint32_t>(args.records) * kBytes;
    const uint64_t tiles = static_cast<uint32_t>(min(i, tiles_after));
    load_weights(registers, next + tiles * tile_bytes + piece * kFragmentBytes, evict_first);
  }

  // Units past the last column have no scales, and their sums are 0.
  __device__ __forceinline__ void load_scales(int chunk, bool exists) {
    const GroupScales& groups = args.groups;
    const unsigned first =
        (next_record * kChunks + chunk) * kChunkUnits + threadIdx.x % 2 * (kChunkUnits / 2);
    unsigned column = column_of_unit(groups, first);
    unsigned unit_of_group = first - column * groups.units;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const bool inside = exists && column < groups.columns;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const unsigned row = min(held_row + i * kFragmentRows, last_row);
        held[i][chunk][h] = inside ? __ldg(scales + (row * groups.columns + column)) : 0.0f;
      }
      if (++unit_of_group == groups.units) ++column, unit_of_group = 0;
    }
  }

  __device__ __forceinline__ float unit_scale(int i, int chunk, int unit, int half) const {
    const int lane = threadIdx.x % kWarp;
    return __shfl_sync(kAllLanes, held[i][chunk][unit % kHeld],
                       lane / 4 * 4 + 2 * half + unit / kHeld);
  }
};

template <class T, int kUnitSteps>
struct Int4 {
  template <int kTokenTiles>
  using Weights = Int4Weights<T, kUnitSteps, kTokenTiles>;
};

template <class T, int kUnitSteps>
void launch_int4(const CudaGemmArgs& args, cudaStream_t stream) {
  const GroupScales groups = group_scales(args, kUnitSteps);
  CudaGemmArgs without_scales = args;  // for the epilogue
  without_scales.row_scales = nullptr;
  launch_decode_of<Int4<T, kUnitSteps>::template Weights>(without_scales, groups, stream);
}

}  // namespace

void gemm_int4_sm80(const CudaGemmArgs& args, cudaStream_t stream) {
  with_int4_units(args, [&](auto zero, auto steps, const CudaGemmArgs& with_units) {
    launch_int4<decltype(zero), decltype(steps)::value>(with_units, stream);
  });
}

}  // namespace gossamer::sparse24
