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
// A warp's weights come to a ring in shared memory by cp.async, four chunks ahead up to 16 rows of
// x (two records of 3 KB for each of 16 warps: 96 KB on their way in a multiprocessor), two above.
// In registers, where they were before, one record was on its way, and only while the warp did not
// widen it: two thirds of the DRAM's rate on an H200. Each lane brings and reads its own 16 bytes
// of weights and 8 of metadata. The scales of a chunk come with them, a lane's share for all, which
// is why the lanes of the warp wait for each other.
//
// What the arithmetic may cost: at 4.8 TB/s, 132 multiprocessors and 1.7 GHz (H200) each gets 21
// bytes a cycle. A step of a row tile, 256 weights kept, is 192 bytes with its metadata: 9 cycles,
// in which the four schedulers issue 36 instructions of a warp. To widen its word takes 11: three
// SHF and four LOP3, at half rate 14 of the 36 cycles, and four HFMA2. With 8 rows of x and units
// of four steps the loop has 21 instructions beside the product, with all addresses and copies, and
// 23 with 16 rows. Shared memory gives x at 128 bytes a cycle: 4 cycles a step for 8 rows of x, by
// two row tiles 2 of the 9, and the ring takes 3, once in and once out. So up to 16 rows the DRAM
// sets the pace, at 32 (three tiles) it should, and at 64 (16 of 9) it is x.
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
  static constexpr int kAhead = decode_chunks_ahead(8 * kTokenTiles);
  static constexpr int kChunkSteps = 4;
  static constexpr int kSteps = Record<T>::kSteps, kChunks = kSteps / kChunkSteps;
  static constexpr int kMetadata = kChunks * kFragmentBytes;
  static constexpr int kBytes = kMetadata + kFragmentBytes;
  static constexpr int kChunkUnits = kChunkSteps / kUnitSteps;
  // With 64 rows of x there are registers for two steps at a time.
  static constexpr int kUnrolled = kTokenTiles < 8 ? kChunkSteps : 2;
  static constexpr int kReadSteps = kUnitSteps < kUnrolled ? kUnitSteps : kUnrolled;
  // Scales of a chunk that a lane brings: of one unit, and of every kLaneRows-th row.
  static constexpr int kLaneRows = kWarp / kChunkUnits;
  static constexpr int kLaneScales = (kTileRows + kLaneRows - 1) / kLaneRows;
  // A chunk of a row tile in the ring: 16 bytes of weights for each lane, then as many of which 8
  // are its metadata, and 8 the scales of some rows g and g + 8 for some unit.
  static constexpr int kMetadataAt = kFragmentBytes, kScalesAt = kMetadataAt + 8;
  static constexpr int kSlot = kRowTiles * kDecodeChunkBytes;
  static constexpr int kRingBytes = kAhead * kSlot;
  static_assert(kDecodeWarps * kRingBytes == decode_ring_bytes(8 * kTokenTiles, kType));
  static_assert(kFragmentRows / 2 * kChunkUnits <= kWarp);
  static_assert(kScalesAt + kWarp * kLaneBytes <= kDecodeChunkBytes + 8);

  const GroupScales& groups;
  const int warps_k, last;
  const uint64_t evict_first;
  // Of this lane: its bytes, the row and the place of the scale it brings, and of those it reads.
  const int bytes_at, own_row, own_scale, first_scale;
  unsigned char* slots;  // of the record that is multiplied
  int turn = 0;
  int next_record;              // the one that is asked for,
  const char* next[kRowTiles];  // its tiles at this lane's bytes
  const float* scales;          // of the first row
  int last_row;                 // of these rows, from 0 on

  __device__ __forceinline__ Int4Weights(const DecodeArgs& args, int tile, int record, int last,
                                         unsigned char* ring)
      : groups(args.groups),
        warps_k(args.warps_k),
        last(last),
        evict_first(ptx::l2_evict_first()),
        bytes_at(hold(lane() * kLaneBytes)),
        own_row(hold(lane() / kChunkUnits)),
        own_scale(hold(kScalesAt + scale_at(lane() / kChunkUnits, lane() % kChunkUnits))),
        first_scale(hold(kScalesAt + scale_at(lane() / 4, 0))),
        slots(ring),
        next_record(record) {
    // A row tile past the last one is that again, and so are rows: their sums go nowhere.
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) next[i] = lane_record(args, tile + i, record, kBytes);
    const int64_t first = int64_t{min(tile, args.row_tiles - 1)} * kFragmentRows;
    scales = hold(groups.scales + first * groups.columns);
    last_row = static_cast<int>(min(args.epilogue.n - 1 - first, int64_t{kTileRows - 1}));
  }

  __device__ __forceinline__ void load(int chunk) {
    if (next_record < last) {
      unsigned char* slot = slots + chunk * kSlot;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        unsigned char* to = slot + bytes_at + i * kDecodeChunkBytes;
        ptx::cp_async16_hint(to, next[i] + chunk * kFragmentBytes, kLaneBytes, evict_first);
        ptx::cp_async8(to + kMetadataAt, next[i] + kMetadata + chunk * 8);
      }
      // Units past the last column have no scales, and their sums are 0.
      const unsigned column = column_of_unit(
          groups, (next_record * kChunks + chunk) * kChunkUnits + lane() % kChunkUnits);
      const bool inside = column < groups.columns;
#pragma unroll
      for (int k = 0; k < kLaneScales; ++k) {
        const int row = own_row + k * kLaneRows;
        if (kTileRows % kLaneRows != 0 && row >= kTileRows) continue;
        ptx::cp_async4(slot + own_scale + scale_at(k * kLaneRows, 0),
                       scales + (inside ? min(row, last_row) * groups.columns + column : 0),
                       inside ? 4 : 0);
      }
    }
    if (chunk < kChunks - 1) return;
    next_record += warps_k;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) next[i] += warps_k * kBytes;
  }

  template <class LoadX>
  __device__ __forceinline__ void multiply(float (&sum)[kRowTiles][kTokenTiles][4], int chunk,
                                           const LoadX& load_x, bool /*has_next*/) {
    const unsigned char* slot = slots + chunk * kSlot;
    __syncwarp();  // the scales, which other lanes have brought, are there
#pragma unroll(kUnrolled / kReadSteps)
    for (int unit = 0; unit < kChunkUnits; ++unit) {
      // Or the compiler widens all units at once, and has too few registers.
      if (unit > 0) __syncwarp();
      float part[kRowTiles][kTokenTiles][4] = {};
      float2 scale[kRowTiles];  // of rows g and g + 8
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int at = first_scale + scale_at(i * kFragmentRows, unit);
        read(scale[i], slot + at);
      }
#pragma unroll 1
      for (int first = 0; first < kUnitSteps; first += kReadSteps) {
        Words<kReadSteps> words[kRowTiles];
        Words<(kReadSteps + 1) / 2> metadata[kRowTiles];  // each of two steps
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const int step = unit * kUnitSteps + first;  // of the chunk
          const unsigned char* from = slot + bytes_at + i * kDecodeChunkBytes;
          read(words[i], from + step * 4);
          read(metadata[i], from + kMetadataAt + step / 2 * 4);
        }
#pragma unroll
        for (int s = 0; s < kReadSteps; ++s) {
          const int step = unit * kUnitSteps + first + s;
          uint32_t a[kRowTiles][4];
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) widen<T>(a[i], words[i].word[s]);
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            uint32_t b[4];
            load_x(b, j, step);
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              const uint32_t word = metadata[i].word[metadata_word<T>(s)];
              multiply_step<T>(part[i][j], a[i], b, word, kReadSteps > 1 ? s : unit);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float by = r < 2 ? scale[i].x : scale[i].y;
            sum[i][j][r] = __fmaf_rn(part[i][j][r], by, sum[i][j][r]);
          }
        }
      }
    }
    __syncwarp();  // no lane reads the slot any more
  }

  __device__ __forceinline__ void rotate() {
    constexpr int kRecords = kAhead / kChunks;  // that the ring holds
    static_assert(kRecords <= 2);
    if constexpr (kRecords == 1) return;
    slots += (turn == 0 ? 1 : -1) * kChunks * kSlot;
    turn ^= 1;
  }

 private:
  template <int N>
  struct alignas(4 * N) Words {
    uint32_t word[N];
  };
  template <class V>
  static __device__ __forceinline__ void read(V& to, const unsigned char* from) {
    to = *reinterpret_cast<const V*>(from);
  }
  // With scales for every step, or 64 rows of x, there are no registers for it.
  template <class V>
  static __device__ __forceinline__ V hold(V value) {
    return kChunkUnits == 1 && kTokenTiles < 8 ? ptx::keep(value) : value;
  }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  // Where a scale lies, after kScalesAt. What this is of 8, 16 or 32 rows, and of a unit, adds up.
  static __device__ __forceinline__ constexpr int scale_at(int row, int unit) {
    return row / kFragmentRows * kDecodeChunkBytes + row / 8 % 2 * 4 +
           (row % 8 * kChunkUnits + unit) * kLaneBytes;
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
