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
// By arithmetic, not measured: a row's piece of 512 bytes of 16-bit floats costs a warp about 26
// instructions (load, 2 shuffles, 7 for the address, 8 to widen, 8 to add), so that an H100's 132 x
// 4 a cycle would take in 18 TB/s. What bounds is the matrix: memory's 3.3 TB/s, or the L2's 5.5
// where it fits there (16 k x 768 of bfloat16 are 25 MB). 24 warps of a multiprocessor have 96 KB
// on their way, and 18 KB would do to keep memory busy.
#include "actsparse/topk_launch.h"
#include "common/ceil_div.h"
#include "common/check.h"
#include "common/ptx.cuh"
#include "common/run.cuh"
#include "common/warp.cuh"

namespace gossamer::actsparse::topk {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kAhead = 8;   // rows that are on their way at a time
constexpr int kLong = 512;  // a bag with more pairs is for all warps of the block

// A lane's columns of a slice: a piece of 16 bytes, or where rows do not allow that, every 32nd.
template <class T, bool kPieces>
constexpr int kEach = kPieces ? 16 / sizeof(T) : 4;
template <class T, bool kPieces>
constexpr int kSlice = kWarp * kEach<T, kPieces>;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// ---- a lane's columns ---------------------------------------------------------------------------

// Past the last column a lane reads again what another one does, so that nothing waits for whether
// it may; it must not write.
template <class T, bool kPieces>
struct Columns;

template <class T>
struct Columns<T, true> {
  static constexpr int kMine = kEach<T, true>;
  using Loaded = uint4;
  int first, from;
  bool there;

  __device__ explicit Columns(int64_t columns)  // of the slice, in whole pieces
      : first(lane() * kMine),
        from(static_cast<int>(min(int64_t{first}, columns - kMine))),
        there(first < columns) {}
  __device__ Loaded load(const T* slice) const { return ptx::load_nc16(slice + from); }
  __device__ void store(T* slice, const T* bias, const float (&sum)[kMine]) const {
    if (!there) return;
    Run<T, kMine> run;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float b = bias == nullptr ? 0.0f : ptx::to_float(bias[first + i]);
      run.at[i] = ptx::from_float<T>(bias == nullptr ? sum[i] : sum[i] + b);
    }
    *reinterpret_cast<Run<T, kMine>*>(slice + first) = run;
  }
};

template <class T>
struct Columns<T, false> {
  static constexpr int kMine = kEach<T, false>;
  using Loaded = Run<T, kMine>;
  int count;

  __device__ explicit Columns(int64_t columns)
      : count(static_cast<int>(min(columns, int64_t{kSlice<T, false>}))) {}
  static __device__ int column(int i) { return lane() + kWarp * i; }
  __device__ Loaded load(const T* slice) const {
    Loaded run;
#pragma unroll
    for (int i = 0; i < kMine; ++i) run.at[i] = slice[min(column(i), count - 1)];
    return run;
  }
  __device__ void store(T* slice, const T* bias, const float (&sum)[kMine]) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (column(i) >= count) continue;
      const float b = bias == nullptr ? 0.0f : ptx::to_float(bias[column(i)]);
      slice[column(i)] = ptx::from_float<T>(bias == nullptr ? sum[i] : sum[i] + b);
    }
  }
};

template <class T>
__device__ __forceinline__ void add_scaled(float (&sum)[4], float scale, const Run<T, 4>& row) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += scale * ptx::to_float(row.at[i]);
}
template <class T, int kMine>
__device__ __forceinline__ void add_scaled(float (&sum)[kMine], float scale, const uint4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kMine == 4) {
      sum[i] += scale * __uint_as_float(words[i]);
    } else {
      const float2 two = ptx::unpack<T>(words[i]);
      sum[2 * i] += scale * two.x, sum[2 * i + 1] += scale * two.y;
    }
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
  int64_t bag, column;  // the first one
  Columns<T, kPieces> columns;
  float sum[kMine] = {};

  __device__ Slice(const CudaBags& all, int64_t item, int64_t slices)
      : args(all),
        bag(item / slices),
        column((item - bag * slices) * kSlice<T, kPieces>),
        columns(all.columns - column) {}

  __device__ void add(int64_t begin, int64_t end) {
    Pair mine = pair_at(begin + lane(), end);
    for (int64_t first = begin; first < end; first += kWarp) {
      const Pair next = pair_at(first + kWarp + lane(), end);
      const int count = static_cast<int>(min(end - first, int64_t{kWarp}));
      int at = 0;
#pragma unroll 1
      for (; at + kAhead <= count; at += kAhead) add_rows<kAhead>(mine, at);
      if (count & 4) add_rows<4>(mine, at), at += 4;
      if (count & 2) add_rows<2>(mine, at), at += 2;
      if (count & 1) add_rows<1>(mine, at);
      mine = next;
    }
  }

  __device__ void write() const {
    const T* bias = static_cast<const T*>(args.bias);
    columns.store(static_cast<T*>(args.out) + bag * args.columns + column,
                  bias == nullptr ? nullptr : bias + column, sum);
  }

 private:
  __device__ Pair pair_at(int64_t at, int64_t end) const {
    return at < end ? pair_of<T>(args, at) : Pair{};
  }

  // The pairs that lanes `at` and after it have.
  template <int kCount>
  __device__ void add_rows(const Pair& pair, int at) {
    const T* matrix = static_cast<const T*>(args.matrix) + column;
    const T* from[kCount];
    typename Columns<T, kPieces>::Loaded rows[kCount];
    float scales[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      from[i] = matrix + __shfl_sync(kAllLanes, pair.row, at + i) * args.stride;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) scales[i] = __shfl_sync(kAllLanes, pair.scale, at + i);
#pragma unroll
    for (int i = 0; i < kCount; ++i) rows[i] = columns.load(from[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) add_scaled<T>(sum, scales[i], rows[i]);
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
      sum[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * half);
    }
  }
  sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 2);
  return sum[0] + __shfl_xor_sync(kAllLanes, sum[0], 1);
}

template <class T, int kMine>
__device__ __forceinline__ float product(const float (&factors)[kMine], const uint4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kMine == 4) {
      sum += factors[i] * __uint_as_float(words[i]);
    } else {
      const float2 two = ptx::unpack<T>(words[i]);
      sum += factors[2 * i] * two.x, sum += factors[2 * i + 1] * two.y;
    }
  }
  return sum;
}

// A warp takes eight pairs of a token; past the last one it reads a row that is there.
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
    const int64_t row = __shfl_sync(kAllLanes, inside ? static_cast<uint32_t>(mine) : 0u, 4 * i);
    rows[i] = static_cast<const T*>(args.matrix) + row * args.stride;
  }
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
  float sum[kAhead] = {};
  constexpr int kMine = kPieces ? kEach<T, true> : 1;
  for (int64_t column = lane() * kMine; column < args.columns; column += kWarp * kMine) {
    if constexpr (kPieces) {
      uint4 some[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) some[i] = ptx::load_nc16(rows[i] + column);
      float factors[kMine] = {};
      add_scaled<T>(factors, 1.0f, *reinterpret_cast<const uint4*>(x + column));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum[i] += product<T>(factors, some[i]);
    } else {
      const float factor = ptx::to_float(x[column]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) sum[i] += factor * ptx::to_float(rows[i][column]);
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
