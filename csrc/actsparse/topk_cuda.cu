// Sums of rows of a matrix, and products with rows of it, for k-sparse codes:
//
//   sum_bags   out[bag] = sum over its pairs of value * matrix[row] (+ bias)
//   dot_rows   out[t, j] = x[t] . matrix[index[t, j]]
//
// A warp takes 512 bytes of columns, 16 a lane, of one bag. Its lanes read 32 pairs at once and
// hand them round; the pieces of eight rows are on their way at a time.
//
//   bag        pair 0   pair 1   ..             a long bag: 8 warps take an eighth each, and their
//   lane 0     piece +  piece +                 sums are added in the warps' order
//   lane 31    piece +  piece +
//
// The order of a sum thus depends on shapes, the bag's length and the size of the GPU alone.
//
// By arithmetic, not measured: a row's piece of 512 bytes of 16-bit floats costs a warp about 21
// instructions (load, 2 shuffles, address, 8 to widen, 8 to add), so that an H100's 132 x 4 a cycle
// would take in 22 TB/s. What bounds is the matrix: memory's 3.3 TB/s, or the L2's 5.5 where it
// fits there (16 k x 768 of bfloat16 are 25 MB). 32 warps of a multiprocessor have 128 KB on their
// way, and 15 KB would do to keep memory busy.
#include "actsparse/topk_launch.h"
#include "common/ceil_div.h"
#include "common/check.h"
#include "common/ptx.cuh"
#include "common/run.cuh"

namespace gossamer::actsparse::topk {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kAhead = 8;   // rows that are on their way at a time
constexpr int kLong = 512;  // a bag with more pairs is for all warps of the block
constexpr unsigned kAll = ~0u;

// A lane's columns of a slice: a piece of 16 bytes, or where rows do not allow that, every 32nd.
template <class T, bool kPieces>
constexpr int kEach = kPieces ? 16 / sizeof(T) : 4;
template <class T, bool kPieces>
constexpr int kSlice = kWarp * kEach<T, kPieces>;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// ---- a lane's columns -----------------------------------------------------------------------

template <class T, bool kPieces>
__device__ __forceinline__ int column_of(int i) {
  return kPieces ? lane() * kEach<T, kPieces> + i : lane() + kWarp * i;
}

// Zeros past the last of `columns`. With kPieces their number is a multiple of a piece's.
template <bool kPieces, class T>
__device__ __forceinline__ Run<T, kEach<T, kPieces>> load(const T* slice, int64_t columns,
                                                          bool wanted) {
  Run<T, kEach<T, kPieces>> run;
  if constexpr (kPieces) {
    uint4 piece{};
    if (wanted && column_of<T, kPieces>(0) < columns) {
      piece = ptx::load_nc16(slice + column_of<T, kPieces>(0));
    }
    run = *reinterpret_cast<const Run<T, kEach<T, kPieces>>*>(&piece);
  } else {
#pragma unroll
    for (int i = 0; i < kEach<T, kPieces>; ++i) {
      const int c = column_of<T, kPieces>(i);
      run.at[i] = wanted && c < columns ? slice[c] : T{};
    }
  }
  return run;
}

template <bool kPieces, class T>
__device__ __forceinline__ void store(T* slice, int64_t columns, const T* bias,
                                      const float (&sum)[kEach<T, kPieces>]) {
  Run<T, kEach<T, kPieces>> run;
#pragma unroll
  for (int i = 0; i < kEach<T, kPieces>; ++i) {
    const int c = column_of<T, kPieces>(i);
    const float b = bias != nullptr && c < columns ? ptx::to_float(bias[c]) : 0.0f;
    run.at[i] = ptx::from_float<T>(bias != nullptr ? sum[i] + b : sum[i]);
    if (!kPieces && c < columns) slice[c] = run.at[i];
  }
  if (kPieces && column_of<T, kPieces>(0) < columns) {
    *reinterpret_cast<Run<T, kEach<T, kPieces>>*>(slice + column_of<T, kPieces>(0)) = run;
  }
}

// ---- pairs --------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t index_of(const CudaCodes& codes, int64_t pair) {
  return codes.wide ? static_cast<const int64_t*>(codes.indices)[pair]
                    : static_cast<const int32_t*>(codes.indices)[pair];
}

struct Pair {
  uint32_t row = 0;
  float scale = 0;
};

template <class T>
__device__ __forceinline__ Pair pair_of(const CudaBags& args, int64_t at) {
  const CudaCodes& codes = args.codes;
  const int64_t number = args.order == nullptr ? at : args.order[at];
  const bool known = static_cast<uint64_t>(number) < static_cast<uint64_t>(codes.pairs);
  const int64_t row = !known ? -1
                      : args.order == nullptr
                          ? index_of(codes, number)
                          : static_cast<uint32_t>(number) / static_cast<uint32_t>(codes.k);
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(args.matrix_rows)) {
    return {0, __uint_as_float(0x7fc00000u)};
  }
  return {static_cast<uint32_t>(row), ptx::to_float(static_cast<const T*>(codes.values)[number])};
}

struct Bag {
  int64_t begin, end;
  __device__ Bag(const CudaBags& args, int64_t bag)
      : begin(args.codes.k * bag), end(begin + args.codes.k) {
    if (args.begins == nullptr) return;
    begin = max(args.begins[bag], int64_t{0});
    end = min(args.begins[bag + 1], args.codes.pairs);
  }
  __device__ bool is_long() const { return end - begin > kLong; }
};

// ---- sums of bags -------------------------------------------------------------------------------

// Of a bag, the columns of a slice.
template <class T, bool kPieces>
struct Slice {
  static constexpr int kMine = kEach<T, kPieces>;
  const CudaBags& args;
  int64_t bag, column, columns;  // the first one, and how many from it on
  float sum[kMine] = {};

  __device__ Slice(const CudaBags& all, int64_t item, int64_t slices) : args(all) {
    bag = item / slices;
    column = (item - bag * slices) * kSlice<T, kPieces>;
    columns = all.columns - column;
  }

  __device__ void add(int64_t begin, int64_t end) {
    const T* matrix = static_cast<const T*>(args.matrix) + column;
    for (int64_t first = begin; first < end; first += kWarp) {
      const int count = static_cast<int>(min(end - first, int64_t{kWarp}));
      Pair mine;
      if (lane() < count) mine = pair_of<T>(args, first + lane());
#pragma unroll 1
      for (int at = 0; at < count; at += kAhead) {
        Run<T, kMine> rows[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int64_t row = __shfl_sync(kAll, mine.row, at + i);
          rows[i] = load<kPieces>(matrix + row * args.stride, columns, at + i < count);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float scale = __shfl_sync(kAll, mine.scale, at + i);
#pragma unroll
          for (int c = 0; c < kMine; ++c) sum[c] += scale * ptx::to_float(rows[i].at[c]);
        }
      }
    }
  }

  __device__ void write() const {
    const T* bias = static_cast<const T*>(args.bias);
    store<kPieces>(static_cast<T*>(args.out) + bag * args.columns + column, columns,
                   bias == nullptr ? nullptr : bias + column, sum);
  }
};

template <class T, bool kPieces>
using Partial = SharedTile<float, int64_t{kThreads} * kEach<T, kPieces>>;

template <class T, bool kPieces>
__global__ void __launch_bounds__(kThreads, kPieces ? 3 : 2) sum_bags(const CudaBags args) {
  float* partial = shared_memory<Partial<T, kPieces>>()->data();
  const int64_t slices = (args.columns + kSlice<T, kPieces> - 1) / kSlice<T, kPieces>;
  const int64_t items = args.bags * slices, here = args.together ? 1 : kWarps;
  const int64_t first = blockIdx.x * here;
  if (!args.together && first + warp() < items) {
    Slice<T, kPieces> slice(args, first + warp(), slices);
    const Bag bag(args, slice.bag);
    if (!bag.is_long()) {
      slice.add(bag.begin, bag.end);
      slice.write();
    }
  }
  if (!args.together && args.begins == nullptr && args.codes.k <= kLong) return;
  for (int64_t item = first; item < min(first + here, items); ++item) {
    Slice<T, kPieces> slice(args, item, slices);
    const Bag bag(args, slice.bag);
    if (!args.together && !bag.is_long()) continue;
    const int64_t share = (bag.end - bag.begin + kWarps - 1) / kWarps;
    const int64_t begin = bag.begin + warp() * share;
    slice.add(begin, min(begin + share, bag.end));
#pragma unroll
    for (int c = 0; c < slice.kMine; ++c) partial[threadIdx.x + kThreads * c] = slice.sum[c];
    __syncthreads();
    if (warp() == 0) {
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int c = 0; c < slice.kMine; ++c) {
          slice.sum[c] += partial[w * kWarp + lane() + kThreads * c];
        }
      }
      slice.write();
    }
    __syncthreads();  // before the next one's sums
  }
}

// ---- products with rows -------------------------------------------------------------------------

// Leaves in lane 4 i and the three after it the sum over the warp of what each has in sum[i].
__device__ __forceinline__ float gather_sums(float (&sum)[kAhead]) {
  static_assert(kAhead == 8);
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane() & 4 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? sum[i] : sum[i + half];
      const float kept = upper ? sum[i + half] : sum[i];
      sum[i] = kept + __shfl_xor_sync(kAll, given, 4 * half);
    }
  }
  sum[0] += __shfl_xor_sync(kAll, sum[0], 2);
  return sum[0] + __shfl_xor_sync(kAll, sum[0], 1);
}

// A warp takes eight pairs of a token.
template <class T, bool kPieces>
__global__ void __launch_bounds__(kThreads, 3) dot_rows(const CudaDots args) {
  const CudaCodes& codes = args.codes;
  const int64_t eights = (codes.k + kAhead - 1) / kAhead;
  const int64_t item = int64_t{blockIdx.x} * kWarps + warp(), token = item / eights;
  if (token * codes.k >= codes.pairs) return;
  const int64_t from = (item - token * eights) * kAhead;
  const int count = static_cast<int>(min(codes.k - from, int64_t{kAhead}));
  const int64_t first = token * codes.k + from;

  const int64_t mine = lane() / 4 < count ? index_of(codes, first + lane() / 4) : -1;
  const bool inside = static_cast<uint64_t>(mine) < static_cast<uint64_t>(args.matrix_rows);
  const T* rows[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int64_t row = __shfl_sync(kAll, inside ? static_cast<uint32_t>(mine) : 0u, 4 * i);
    rows[i] = static_cast<const T*>(args.matrix) + row * args.stride;
  }
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
  float sum[kAhead] = {};
  for (int64_t column = 0; column < args.columns; column += kSlice<T, kPieces>) {
    const int64_t columns = args.columns - column;
    Run<T, kEach<T, kPieces>> some[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) some[i] = load<kPieces>(rows[i] + column, columns, i < count);
    const auto factor = load<kPieces>(x + column, columns, true);
#pragma unroll
    for (int c = 0; c < kEach<T, kPieces>; ++c) {
      const float f = ptx::to_float(factor.at[c]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum[i] += f * ptx::to_float(some[i].at[c]);
    }
  }
  const float total = gather_sums(sum);
  if (lane() % 4 == 0 && lane() / 4 < count) {
    static_cast<T*>(args.out)[first + lane() / 4] =
        ptx::from_float<T>(inside ? total : __uint_as_float(0x7fc00000u));
  }
}

// ---- launching ----------------------------------------------------------------------------------

// Whether every row of so many columns can be read by pieces.
template <class T>
bool in_pieces(const void* data, int64_t stride, int64_t columns) {
  constexpr int64_t kPiece = kEach<T, true>;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kPiece == 0 &&
         columns % kPiece == 0;
}

template <class T, bool kPieces>
void launch_sums(const CudaBags& args, cudaStream_t stream) {
  const int64_t items = args.bags * ceil_div(args.columns, int64_t{kSlice<T, kPieces>});
  const int64_t blocks = args.together ? items : ceil_div(items, int64_t{kWarps});
  launch(sum_bags<T, kPieces>, static_cast<unsigned>(blocks), kThreads, sizeof(Partial<T, kPieces>),
         stream, args);
}

template <class T>
void launch_sums(const CudaBags& args, cudaStream_t stream) {
  in_pieces<T>(args.matrix, args.stride, args.columns) &&
          in_pieces<T>(args.out, args.columns, args.columns)
      ? launch_sums<T, true>(args, stream)
      : launch_sums<T, false>(args, stream);
}

template <class T>
void launch_dots(const CudaDots& args, cudaStream_t stream) {
  const bool pieces = in_pieces<T>(args.matrix, args.stride, args.columns) &&
                      in_pieces<T>(args.x, args.x_stride, args.columns);
  const int64_t items = args.codes.pairs / args.codes.k * ceil_div(args.codes.k, int64_t{kAhead});
  launch(pieces ? dot_rows<T, true> : dot_rows<T, false>,
         static_cast<unsigned>(ceil_div(items, int64_t{kWarps})), kThreads, 0, stream, args);
}

}  // namespace

void sum_bags_cuda(const CudaBags& args, cudaStream_t stream) {
  if (args.bags == 0 || args.columns == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: return launch_sums<float>(args, stream);
    case DType::kBFloat16: return launch_sums<BFloat16>(args, stream);
    case DType::kFloat16: return launch_sums<Float16>(args, stream);
    default: fail("topk: there is no kernel for sums of ", name(args.dtype));
  }
}

void dot_rows_cuda(const CudaDots& args, cudaStream_t stream) {
  if (args.codes.pairs == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: return launch_dots<float>(args, stream);
    case DType::kBFloat16: return launch_dots<BFloat16>(args, stream);
    case DType::kFloat16: return launch_dots<Float16>(args, stream);
    default: fail("topk: there is no kernel for products of ", name(args.dtype));
  }
}

}  // namespace gossamer::actsparse::topk
