// What a GPU's convolutions read of a kernel map (cuda.h), made of it without a wait.
//
//   masks       the taps of each output as bits; sorted, outputs of the same taps are neighbours
//   groups      the position of each output, and the taps that each group of positions has
//   table       the same in the order of the groups with most taps first, and all neighbours
//
// The sorts between these are torch's. Bits and counts are gathered by atomics on integers, whose
// result no order of blocks changes.
//
// By arithmetic, for 100,000 voxels and 900,000 pairs on 132 multiprocessors: each of the three
// walks over the pairs reads 4 to 8 MB and goes to 900,000 sectors of the L2, 29 MB: 8 us at the 4
// TB/s of scattered sectors. Filling 11 MB of neighbours is 4 us, and what is left launches of 2
// us; the sort of 100,000 masks of 32 bits is four passes, some 30 us.
#include "common/ceil_div.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "pointcloud/layout_cuda.h"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMaskBits = 62;  // taps beyond share bits

// Of the thread's pair, in a grid with a row of blocks a tap; false where there is none.
struct Pair {
  unsigned tap;
  int64_t at;
  int out;

  __device__ bool find(const CudaPairs& pairs) {
    tap = blockIdx.y;
    at = pairs.tap_offsets[tap] + int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (at < 0 || at >= min(pairs.tap_offsets[tap + 1], pairs.pairs)) return false;
    out = pairs.out[at];
    return static_cast<unsigned>(out) < static_cast<unsigned>(pairs.n_out);
  }
};

template <class Mask>
__global__ void __launch_bounds__(kThreads) mask_kernel(const CudaPairs pairs, Mask* masks) {
  Pair pair;
  // A sum: where taps share bits, outputs of the same taps still have the same.
  if (pair.find(pairs)) atomicAdd(&masks[pair.out], Mask{1} << pair.tap % kMaskBits);
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(const CudaPairs pairs, const CudaGroups groups) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= pairs.n_out) return;
  const int64_t rank = groups.order[position];
  if (static_cast<uint64_t>(rank) < static_cast<uint64_t>(pairs.n_out)) {
    groups.places[rank] = static_cast<int32_t>(position);
  }
}

__global__ void __launch_bounds__(kThreads)
    present_kernel(const CudaPairs pairs, const CudaGroups groups) {
  Pair pair;
  if (!pair.find(pairs)) return;
  const auto place = static_cast<unsigned>(groups.places[pair.out]);
  const int64_t group = place / kGroupRows;
  if (group >= groups.groups) return;  // of an order that is none
  const int32_t bit = 1 << place % kGroupRows / kQuarterRows;
  int32_t* bits = groups.bits + group * pairs.taps + pair.tap;
  if (atomicOr(bits, bit) == 0) atomicAdd(&groups.bits[groups.groups * pairs.taps + group], 1);
}

// A block for each group, where it ends up.
__global__ void __launch_bounds__(kGroupRows)
    rows_kernel(const CudaPairs pairs, const CudaGroups groups, const CudaTable table) {
  const int64_t before = table.heavy[blockIdx.x];
  if (static_cast<uint64_t>(before) >= static_cast<uint64_t>(groups.groups)) return;
  const int64_t from = before * kGroupRows + threadIdx.x;
  const int64_t to = int64_t{blockIdx.x} * kGroupRows + threadIdx.x;
  int32_t row = -1;
  if (from < pairs.n_out) {
    const int64_t rank = groups.order[from];
    if (static_cast<uint64_t>(rank) < static_cast<uint64_t>(pairs.n_out)) {
      groups.places[rank] = static_cast<int32_t>(to);
      row = pairs.out_order == nullptr ? static_cast<int32_t>(rank) : pairs.out_order[rank];
    }
  }
  table.rows[to] = row;

  if (threadIdx.x >= kWarp) return;
  int64_t place = table.begins[blockIdx.x];
  const int32_t* bits = groups.bits + before * pairs.taps;
  for (int64_t first = 0; first < pairs.taps; first += kWarp) {
    const int64_t tap = first + threadIdx.x;
    const int32_t here = tap < pairs.taps ? bits[tap] : 0;
    const uint32_t present = __ballot_sync(kAllLanes, here != 0);
    const int64_t mine = place + __popc(present & ((1u << threadIdx.x) - 1));
    if (here != 0 && mine >= 0 && mine < table.visits) {
      table.visited[mine] = static_cast<int32_t>(tap) << kQuarters | here;
    }
    place += __popc(present);
  }
}

__device__ __forceinline__ int32_t row_of(int32_t rank, const int32_t* order, int64_t rows) {
  if (order == nullptr) return rank;
  return static_cast<uint64_t>(rank) < static_cast<uint64_t>(rows) ? order[rank] : -1;
}

__global__ void __launch_bounds__(kThreads)
    neighbours_kernel(const CudaPairs pairs, const int32_t* places, int64_t positions,
                      int32_t* neighbours) {
  Pair pair;
  if (!pair.find(pairs)) return;
  const auto place = static_cast<unsigned>(places[pair.out]);
  if (place < positions) {
    neighbours[pair.tap * positions + place] =
        row_of(pairs.in[pair.at], pairs.in_order, pairs.n_in);
  }
}

__global__ void __launch_bounds__(kThreads)
    pair_rows_kernel(const CudaPairs pairs, int32_t* in_rows, int32_t* out_rows) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= pairs.pairs) return;
  in_rows[at] = row_of(pairs.in[at], pairs.in_order, pairs.n_in);
  out_rows[at] = row_of(pairs.out[at], pairs.out_order, pairs.n_out);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

dim3 grid_of(const CudaPairs& pairs) {
  return {blocks_for(pairs.most), static_cast<unsigned>(pairs.taps)};
}

}  // namespace

void mask_taps(const CudaPairs& pairs, void* masks, bool wide, cudaStream_t stream) {
  if (pairs.n_out == 0) return;
  using Wide = unsigned long long;
  fill_zero(masks, pairs.n_out * (wide ? sizeof(Wide) : sizeof(unsigned)), stream);
  if (pairs.most == 0) return;
  if (wide) {
    launch(mask_kernel<Wide>, grid_of(pairs), kThreads, 0, stream, pairs,
           static_cast<Wide*>(masks));
  } else {
    launch(mask_kernel<unsigned>, grid_of(pairs), kThreads, 0, stream, pairs,
           static_cast<unsigned*>(masks));
  }
}

void group_outputs(const CudaPairs& pairs, const CudaGroups& groups, cudaStream_t stream) {
  if (pairs.n_out == 0) return;
  fill_zero(groups.bits, groups.groups * (pairs.taps + 1) * sizeof(int32_t), stream);
  launch(place_kernel, blocks_for(pairs.n_out), kThreads, 0, stream, pairs, groups);
  if (pairs.most > 0) launch(present_kernel, grid_of(pairs), kThreads, 0, stream, pairs, groups);
}

void fill_table(const CudaPairs& pairs, const CudaGroups& groups, const CudaTable& table,
                cudaStream_t stream) {
  if (pairs.n_out == 0) return;
  launch(rows_kernel, static_cast<unsigned>(groups.groups), kGroupRows, 0, stream, pairs, groups,
         table);
  if (pairs.most == 0) return;
  launch(neighbours_kernel, grid_of(pairs), kThreads, 0, stream, pairs, groups.places,
         groups.groups * kGroupRows, table.neighbours);
}

void rows_of_pairs(const CudaPairs& pairs, int32_t* in_rows, int32_t* out_rows,
                   cudaStream_t stream) {
  if (pairs.pairs == 0) return;
  launch(pair_rows_kernel, blocks_for(pairs.pairs), kThreads, 0, stream, pairs, in_rows, out_rows);
}

}  // namespace gossamer::pointcloud
