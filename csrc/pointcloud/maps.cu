// The pairs of a kernel map on a GPU: those of the CPU's search, in its order.
//
//   number   the 64-bit key of every target, ascending, and of the cell where each walker's window
//            begins; taps along the last axis are keys a constant apart
//   count    for each line of such taps and each walker, a binary search for the first of them, and
//            from there on a step a tap; a warp's 32 walkers vote, tap by tap
//   write    the same search again, which knows from the sums of the counts where its pairs go
//
// The taps' pairs ascend by walker, so where one goes depends on counts alone: no atomics, nothing
// that hangs on the order of blocks. Searching twice reads less than a table [taps, walkers] would
// cost to write and read, and needs no memory of that size.
//
// By arithmetic, for 100,000 voxels and 3x3x3 taps on 132 multiprocessors: 0.9 million searches of
// 17 dependent reads each. Neighbouring lanes look for neighbouring keys, so that a warp reads one
// or two sectors at once, and the first steps are the same for all and come from the L1; with 64
// warps a multiprocessor there are 3.3 rounds of some 4000 cycles: 8 us. Writing 900,000 pairs is
// 7 MB: 3 us more. A hash would read a sector for each of 2.7 million lookups: 86 MB from the L2
// each time, after building it with atomics.
//
// The outputs of a strided layer are marked in a byte a cell, a thread an input and tap, or written
// down as keys where the box of all cells is much larger than the inputs. All that mark a byte
// write the same into it. 2.7 million threads of some 120 instructions are 11 us, whatever the
// stride: what it divides is multiplied (divisor.h). 11 MB of marks are cleared in 4 us.
#include "common/ceil_div.h"
#include "common/warp.cuh"
#include "pointcloud/maps_cuda.h"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 256;
// Blocks that fill a multiprocessor with warps: a search waits for memory most of the time.
constexpr int kResident = 8;
constexpr int64_t kMaxGrid = 1 << 14;  // beyond, a thread numbers more rows
static_assert(kSearchWalkers == kWarp);

__global__ void __launch_bounds__(kThreads)
    number_kernel(const WindowKeys window, const NumberedRows rows, bool walkers) {
  const int64_t all = int64_t{gridDim.x} * kThreads;
  for (int64_t rank = int64_t{blockIdx.x} * kThreads + threadIdx.x; rank < rows.count;
       rank += all) {
    const int64_t row = rows.order == nullptr ? rank : rows.order[rank];
    const int32_t* coordinate = rows.coords + row * window.columns;
    uint64_t key = 0;
    bool possible = true;
    for (int c = 0; c < window.columns; ++c) {
      int64_t at = coordinate[c];
      if (walkers) {
        at = at * window.stride[c] - window.padding[c];
        possible &= at >= window.least[c] && at <= window.most[c];
      }
      key += static_cast<uint64_t>(at - window.low[c]) * window.step[c];
    }
    rows.keys[rank] = possible ? key : kNoKey;
  }
}

// The first of the keys [begin, end) that is not below `wanted`, or end.
__device__ __forceinline__ int lower_bound(const uint64_t* __restrict__ keys, int begin, int end,
                                           uint64_t wanted) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (keys[middle] < wanted) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// From a walker's window's beginning to the first tap of a line.
__device__ __forceinline__ uint64_t shift_of(const WindowKeys& window, unsigned line) {
  uint64_t shift = 0;
  for (int axis = window.columns - 3; axis >= 0; --axis) {
    const auto length = static_cast<unsigned>(window.kernel[axis]);
    const unsigned rest = line / length;
    shift += (line - rest * length) * window.tap_step[axis];
    line = rest;
  }
  return shift;
}

// A warp takes 32 walkers and a line of taps.
template <bool kWrite>
__global__ void __launch_bounds__(kThreads, kResident) search_kernel(const CudaSearchArgs args) {
  const WindowKeys& window = args.window;
  const auto walkers = static_cast<int>(args.walkers), targets = static_cast<int>(args.targets);
  const unsigned chunks = (static_cast<unsigned>(walkers) + kWarp - 1) / kWarp;
  const unsigned warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (warp >= chunks * static_cast<unsigned>(window.lines)) return;
  const unsigned line = warp / chunks, chunk = warp - line * chunks;
  const unsigned lane = threadIdx.x % kWarp, walker = chunk * kWarp + lane;

  const uint64_t origin =
      walker < static_cast<unsigned>(walkers) ? args.walker_keys[walker] : kNoKey;
  uint64_t wanted = origin + shift_of(window, line);
  int at = origin != kNoKey ? lower_bound(args.target_keys, 0, targets, wanted) : targets;
  const auto dilation = static_cast<int>(window.dilation);
  int64_t index = int64_t{line} * window.line_taps * chunks + chunk;
  for (auto taps = static_cast<int>(window.line_taps); taps > 0; --taps, index += chunks) {
    const bool hit = at < targets && args.target_keys[at] == wanted;
    const uint32_t hits = __ballot_sync(kAllLanes, hit);
    if (kWrite) {
      const int64_t place = args.ends[index] - __popc(hits) + __popc(hits & ((1u << lane) - 1));
      if (hit && place >= 0 && place < args.pairs) {
        args.walker_ranks[place] = static_cast<int32_t>(walker);
        args.target_ranks[place] = at;
      }
    } else if (lane == 0) {
      args.counts[index] = __popc(hits);
    }
    // Keys differ: the next tap's is at most as many targets ahead as cells.
    wanted += window.tap_step[window.columns - 2];
    at = lower_bound(args.target_keys, at, targets - at > dilation ? at + dilation : targets,
                     wanted);
  }
}

// x is below 2**63.
__device__ __forceinline__ uint64_t quotient(uint64_t x, const Divisor& by) {
  return (by.magic == 0 ? x : __umul64hi(x, by.magic)) >> by.shift;
}

__global__ void __launch_bounds__(kThreads) outputs_kernel(const CudaOutputsArgs args) {
  const int64_t input = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (input >= args.inputs) return;
  const int32_t* coordinate = args.coords + input * args.columns;
  bool made = coordinate[0] >= args.low[0] && coordinate[0] <= args.high[0];
  uint64_t key = static_cast<uint64_t>(coordinate[0] - args.low[0]) * args.step[0];
  unsigned rest = blockIdx.y;
  for (int axis = args.columns - 2; axis >= 0; --axis) {
    const auto line = static_cast<unsigned>(quotient(rest, args.by_kernel[axis]));
    const int64_t tap = rest - line * static_cast<unsigned>(args.kernel[axis]);
    rest = line;
    const int64_t ahead = tap * args.dilation[axis] - args.padding[axis];
    const int64_t in = coordinate[axis + 1], stride = args.stride[axis];
    const int64_t low = args.low[axis + 1];
    int64_t cell = in * stride + ahead - low;  // of the output, counted from the first there is
    if (args.divides) {
      const int64_t scaled = in - ahead - low * stride;
      cell = scaled < 0 ? -1 : static_cast<int64_t>(quotient(scaled, args.by_stride[axis]));
      made &= !args.exact || cell * stride == scaled;
    }
    made &= cell >= 0 && cell <= args.high[axis + 1] - low;
    key += static_cast<uint64_t>(cell) * args.step[axis + 1];
  }
  if (args.marks == nullptr) {
    args.keys[blockIdx.y * args.inputs + input] = made ? key : kNoKey;
  } else if (made) {
    args.marks[key] = 1;
  }
}

__global__ void __launch_bounds__(kThreads) cells_kernel(const CudaCells args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.count) return;
  uint64_t rest = args.keys[i];
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c) {
    if (c == args.columns) break;
    const uint64_t cell = quotient(rest, args.by_step[c]);
    rest -= cell * args.step[c];
    args.coords[i * args.columns + c] =
        static_cast<int32_t>(static_cast<int64_t>(cell) + args.low[c]);
  }
}

}  // namespace

void number_rows(const WindowKeys& window, const NumberedRows& rows, bool walkers,
                 cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows.count, kThreads);
  if (blocks == 0) return;
  launch(number_kernel, static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid), kThreads, 0,
         stream, window, rows, walkers);
}

void search_pairs(const CudaSearchArgs& args, cudaStream_t stream) {
  const int64_t warps = ceil_div(args.walkers, kWarp) * args.window.lines;
  if (warps == 0) return;
  launch(args.walker_ranks == nullptr ? search_kernel<false> : search_kernel<true>,
         static_cast<unsigned>(ceil_div(warps, kThreads / kWarp)), kThreads, 0, stream, args);
}

void find_outputs(const CudaOutputsArgs& args, cudaStream_t stream) {
  if (args.inputs == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.inputs, kThreads)),
                  static_cast<unsigned>(args.taps));
  launch(outputs_kernel, grid, kThreads, 0, stream, args);
}

void cells_of_keys(const CudaCells& args, cudaStream_t stream) {
  if (args.count == 0) return;
  launch(cells_kernel, static_cast<unsigned>(ceil_div(args.count, kThreads)), kThreads, 0, stream,
         args);
}

}  // namespace gossamer::pointcloud
