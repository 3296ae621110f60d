// The product that skips zero inputs, for few tokens:
//
//   y[m, n] = act(b[n] + sum over active k of x[m, k] W[k, n]),   W [K, N]
//
// An inactive input's row of W is not read where no token of the tile has it active, so the time is
// that of the rows that are left. For 4.4 TB/s a multiprocessor of an H200 has to have about 30 KB
// on their way (33 GB/s each, 0.9 us of latency): a warp has 8 rows of 512 bytes (4 of 8 tokens),
// 16 warps 64 (32) KB.
//
//   block    tile of 1 to 8 tokens x 32 lanes of 16 bytes of outputs
//   1 find   which inputs are active in any token, into a list in shared memory
//
//              x       . 3 . 1 . . 2 .         position  0  1  2
//              list    1:3  3:1  6:2           block     0  1  0     of split_k = 2
//
//            One token: every block looks at the whole of x, and takes every split_k-th entry, so
//            that all have as many rows to read as the others, wherever zeros lie. That is 28 KB
//            from the L2 for each block of K = 14336, about 900 cycles a multiprocessor. Several
//            tokens: each block has a range of K, whose zeros are its luck.
//   2 add    warp w takes entries w, w + 8, ..; a slot's registers are filled again as soon as they
//            are used. A token for which the row is inactive does not add it, even times zero
//   3 sum    warps in shared memory; with split_k > 1 blocks leave their sums in the workspace,
//            and the last of the tile to arrive adds them up. All in a fixed order.
//
// Instructions, by count: 512 bytes of 16-bit weights take a warp some 15, 8 to widen them and 8
// for each token: at 4.4 TB/s (20 bytes a cycle) a multiprocessor's four schedulers have 100 for
// them, which 8 tokens just fit.
#include "actsparse/linear_cuda.h"
#include "common/activation.cuh"
#include "common/check.h"
#include "common/run.cuh"
#include "common/warp.cuh"

namespace gossamer::actsparse {
namespace {

struct Args {
  int64_t m, n, k;
  const void* x;
  int64_t x_stride;  // elements
  const char* weight;
  int64_t weight_stride;  // bytes
  const void* bias;
  void* out;
  float* workspace;
  int32_t* counters;
  float threshold;
  int round;  // inputs that are looked at at once
  int split_k, token_tiles;
  bool is_packed;
  Activation activation;
};

// Inputs that a thread looks at in a round, in pieces of consecutive ones; and entries of the list.
template <int TM>
struct Search {
  static constexpr int kMine = TM == 1 ? 64 : 32 / TM;
  static constexpr int kPiece = kMine < 8 ? kMine : 8;
  static constexpr int kPieces = kMine / kPiece;
  static constexpr int kRound = kMine * kLinearThreads;
  static constexpr int kList = TM == 1 ? 2048 : kRound;
  // One token's blocks share each round's active inputs; else each block has inputs of its own.
  static constexpr bool kShares = TM == 1;
};

template <class T, int TM>
struct Shared {
  SharedTile<uint32_t, Search<TM>::kList> entries;  // input of the round | tokens << 16
  SharedTile<float, Search<TM>::kList * TM> x;
  SharedTile<float, kLinearWarps * kWarp * (16 / int{sizeof(T)})> sums;
  SharedTile<int, kLinearWarps> totals;
};

// ---- finding what is active ---------------------------------------------------------------------

__device__ __forceinline__ bool is_active(float x, float threshold) {
  const bool inactive = fabsf(x) <= threshold;  // false for a NaN
  return !inactive;
}

__device__ __forceinline__ const uint8_t& byte_of(const Args& args, int64_t token, int64_t k) {
  return static_cast<const uint8_t*>(args.x)[token * args.x_stride + k / 8];
}

// Which inputs are active, as bits, looked at one by one. A function of its own, or its code would
// stand there once for each piece.
template <class T>
__device__ __noinline__ uint32_t active_ones(const T* x, int count, float threshold) {
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    bits |= (is_active(ptx::to_float(x[i]), threshold) ? 1u : 0u) << i;
  }
  return bits;
}

// The same of kCount inputs of a token from k on, of which `valid` exist.
template <class T, int kCount>
__device__ __forceinline__ uint32_t active_bits(const Args& args, int64_t token, int64_t k,
                                                int64_t valid) {
  if (args.is_packed) {
    const uint32_t exist = (1u << min(valid, int64_t{kCount})) - 1;
    return byte_of(args, token, k) >> (k % 8) & exist;
  }
  using R = Run<T, kCount>;
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride + k;
  uint32_t bits = 0;
  if (valid >= kCount && is_aligned_for<R>(x)) {
    const R run = *reinterpret_cast<const R*>(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits |= (is_active(ptx::to_float(run.at[i]), args.threshold) ? 1u : 0u) << i;
    }
    return bits;
  }
  return active_ones<T>(x, static_cast<int>(min(valid, int64_t{kCount})), args.threshold);
}

// One input of a token, and whether it is active.
template <class T>
__device__ __forceinline__ bool active_value(const Args& args, int64_t token, int64_t k, float& x) {
  if (args.is_packed) {
    x = 1.0f;
    return (byte_of(args, token, k) >> (k % 8) & 1) != 0;
  }
  x = ptx::to_float(static_cast<const T*>(args.x)[token * args.x_stride + k]);
  return is_active(x, args.threshold);
}

// How many of all threads' counts come before this thread's; `total` gets their sum.
__device__ __forceinline__ int place_of(int count, int* totals, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = count;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) totals[warp] = sum;
  __syncthreads();
  int place = sum - count;
  total = 0;
#pragma unroll
  for (int w = 0; w < kLinearWarps; ++w) {
    if (w < warp) place += totals[w];
    total += totals[w];
  }
  return place;
}

// Lists every `stride`-th active input of [first, end), from the `offset`-th on, and returns how
// many those are.
template <class T, int TM>
__device__ __forceinline__ int find_active(const Args& args, Shared<T, TM>& shared,
                                           int64_t first_token, int tokens, int64_t first,
                                           int64_t end, int stride, int offset) {
  using S = Search<TM>;
  const auto input_of = [](int piece) {
    return (piece * kLinearThreads + static_cast<int>(threadIdx.x)) * S::kPiece;
  };
  uint64_t active = 0;
#pragma unroll
  for (int piece = 0; piece < S::kPieces; ++piece) {
    const int64_t k = first + input_of(piece);
    if (k >= end) continue;
    uint32_t any = 0;
#pragma unroll 4
    for (int t = 0; t < TM; ++t) {
      if (t < tokens) any |= active_bits<T, S::kPiece>(args, first_token + t, k, end - k);
    }
    active |= uint64_t{any} << (piece * S::kPiece);
  }
  int total;
  const int place = place_of(__popcll(active), shared.totals.data(), total);
  int skip = (offset - place % stride + stride) % stride;  // entries that are others'
  int at = (place + skip) / stride;
#pragma unroll 1
  for (int piece = 0; piece < S::kPieces; ++piece) {
    auto bits = static_cast<uint32_t>(active >> (piece * S::kPiece)) & ((1u << S::kPiece) - 1);
    const int count = __popc(bits);
    if (skip >= count) {
      skip -= count;
      continue;
    }
    for (; bits != 0; bits &= bits - 1, --skip) {
      if (skip > 0) continue;
      skip = stride;
      const int i = __ffs(static_cast<int>(bits)) - 1, input = input_of(piece) + i;
      const int64_t k = first + input;
      uint32_t has = 0;
#pragma unroll 4
      for (int t = 0; t < TM; ++t) {
        float x = 0.0f;  // of a token that there is not, too, since a run of them is read
        if (t < tokens && active_value<T>(args, first_token + t, k, x)) has |= 1u << t;
        shared.x[int64_t{at} * TM + t] = x;
      }
      shared.entries[at] = static_cast<uint32_t>(input) | has << 16;
      ++at;
    }
  }
  __syncthreads();
  return (total - offset + stride - 1) / stride;
}

// ---- adding rows --------------------------------------------------------------------------------

// A lane's weights of a row: 16 aligned bytes, or elements 32 apart of memory of any alignment.
template <class T, bool kAligned>
struct Weights {
  static constexpr int kColumns = 16 / sizeof(T);
  static constexpr int kTile = kColumns * kWarp;
  uint4 bytes;

  static __device__ int column(int lane, int i) { return lane * kColumns + i; }
  // What load() is told of the row: this lane's byte. A lane past the end reads the last bytes.
  static __device__ int place(int lane, int64_t columns) {
    return static_cast<int>(min(int64_t{lane}, columns / kColumns - 1)) * 16;
  }
  __device__ __forceinline__ void load(const char* row, int place, uint64_t policy) {
    bytes = ptx::load_nc16_hint(row + place, policy);
  }
  __device__ __forceinline__ void widen(float (&w)[kColumns]) const {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        w[i] = __uint_as_float(words[i]);
      } else {
        const float2 two = ptx::unpack<T>(words[i]);
        w[2 * i] = two.x, w[2 * i + 1] = two.y;
      }
    }
  }
};

template <class T>
struct Weights<T, false> {
  static constexpr int kColumns = 16 / sizeof(T);
  static constexpr int kTile = kColumns * kWarp;
  T elements[kColumns];

  static __device__ int column(int lane, int i) { return lane + i * kWarp; }
  // How many columns there are from this lane's first on.
  static __device__ int place(int lane, int64_t columns) {
    return static_cast<int>(min(columns, int64_t{kTile})) - lane;
  }
  __device__ __forceinline__ void load(const char* row, int place, uint64_t /*policy*/) {
    const T* from = reinterpret_cast<const T*>(row) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) elements[i] = i * kWarp < place ? from[i * kWarp] : T{};
  }
  __device__ __forceinline__ void widen(float (&w)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) w[i] = ptx::to_float(elements[i]);
  }
};

// sum += the weights of the entry times x of the tokens that have it active.
template <int TM, int kColumns>
__device__ __forceinline__ void add(float (&sum)[TM][kColumns], const float (&w)[kColumns],
                                    uint32_t entry, const float* x) {
  const Run<float, TM> values = *reinterpret_cast<const Run<float, TM>*>(x);
#pragma unroll
  for (int t = 0; t < TM; ++t) {
    if (TM > 1 && (entry >> (16 + t) & 1) == 0) continue;  // of all lanes alike
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[t][i] = fmaf(values.at[t], w[i], sum[t][i]);
  }
}

// A function of its own: the activations' code is long, and the sums of each token are written.
template <class T>
__device__ __noinline__ void write(const T* bias, T* out, Activation activation, float sum) {
  if (bias != nullptr) sum += ptx::to_float(*bias);
  *out = ptx::from_float<T>(activate(sum, activation));
}

template <class T>
__device__ __forceinline__ void finish(const Args& args, int64_t token, int64_t n, float sum) {
  if (n >= args.n) return;
  const T* bias = static_cast<const T*>(args.bias);
  write<T>(bias == nullptr ? nullptr : bias + n, static_cast<T*>(args.out) + token * args.n + n,
           args.activation, sum);
}

template <class T, int TM, bool kAligned>
__global__ void __launch_bounds__(kLinearThreads, kLinearResident) linear_kernel(const Args args) {
  using W = Weights<T, kAligned>;
  using S = Search<TM>;
  constexpr int kColumns = W::kColumns, kTile = W::kTile;
  constexpr int kSlots = !kAligned ? 1 : TM == 8 ? 4 : 8;  // rows of a warp on their way
  Shared<T, TM>& shared = *shared_memory<Shared<T, TM>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t first_token = block % args.token_tiles * TM;
  const int64_t first_n = block / args.token_tiles * kTile;
  const int tokens = static_cast<int>(min(args.m - first_token, int64_t{TM}));
  const int split = static_cast<int>(blockIdx.y);

  int64_t begin = 0, last = args.k;
  if (!S::kShares) {
    const int64_t depth = (args.k + 8 * args.split_k - 1) / (8 * args.split_k) * 8;  // whole bytes
    begin = min(split * depth, args.k), last = min(begin + depth, args.k);
  }
  const int stride = S::kShares ? args.split_k : 1, offset = S::kShares ? split : 0;
  const uint64_t policy = ptx::l2_evict_first();
  const int place = W::place(lane, args.n - first_n);
  float sum[TM][kColumns] = {};
  for (int64_t first = begin; first < last; first += args.round) {
    if (first > begin) __syncthreads();  // all have read the list that goes
    const int count = find_active<T, TM>(args, shared, first_token, tokens, first,
                                         min(first + args.round, last), stride, offset);
    const char* rows = args.weight + first_n * int64_t{sizeof(T)} + first * args.weight_stride;
    const auto load = [&](W& slot, int entry) {
      const auto input = static_cast<int64_t>(shared.entries[entry] & 0xffff);
      slot.load(rows + input * args.weight_stride, place, policy);
    };
    W slots[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int entry = warp + i * kLinearWarps;
      if (entry < count) load(slots[i], entry);
    }
#pragma unroll 1
    for (int entry = warp; entry < count; entry += kSlots * kLinearWarps) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int now = entry + i * kLinearWarps, next = now + kSlots * kLinearWarps;
        if (now >= count) break;
        float w[kColumns];
        slots[i].widen(w);
        if (next < count) load(slots[i], next);
        add<TM, kColumns>(sum, w, shared.entries[now], &shared.x[int64_t{now} * TM]);
      }
    }
  }

  // The block's sums, token by token: [warp][output] in shared memory.
  float* partial = args.workspace + block * args.split_k * TM * kTile;
#pragma unroll
  for (int t = 0; t < TM; ++t) {
    if (t >= tokens) break;
    if (t > 0) __syncthreads();  // all have added the token before
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      shared.sums[warp * kTile + W::column(lane, i)] = sum[t][i];
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < kTile; c += kLinearThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kLinearWarps; ++w) total += shared.sums[w * kTile + c];
      if (args.split_k == 1) {
        finish<T>(args, first_token + t, first_n + c, total);
      } else {
        partial[(split * TM + t) * kTile + c] = total;
      }
    }
  }
  if (args.split_k == 1) return;

  __threadfence();  // the sums are there for whoever sees the count
  __syncthreads();
  int32_t* counter = args.counters + block;
  const bool is_last =
      __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == args.split_k - 1);
  if (!is_last) return;
  if (threadIdx.x == 0) *counter = 0;  // for the next launch
  __threadfence();
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens * kTile; i += kLinearThreads) {
    float total = 0.0f;
#pragma unroll 8
    for (int s = 0; s < args.split_k; ++s) total += partial[s * TM * kTile + i];
    finish<T>(args, first_token + i / kTile, first_n + i % kTile, total);
  }
}

template <class T, int TM, bool kAligned>
void launch_linear(const CudaLinearArgs& given, cudaStream_t stream) {
  using S = Search<TM>;
  const auto token_tiles = static_cast<int>(ceil_div(given.m, TM));
  const int64_t size = sizeof(T), most = int64_t{S::kList} * given.config.split_k;
  const auto round = static_cast<int>(S::kShares ? std::min<int64_t>(S::kRound, most) : S::kRound);
  const Args args{given.m,
                  given.n,
                  given.k,
                  given.x,
                  given.x_stride,
                  static_cast<const char*>(given.weight),
                  given.weight_stride * size,
                  given.bias,
                  given.out,
                  given.workspace,
                  given.counters,
                  given.threshold,
                  round,
                  given.config.split_k,
                  token_tiles,
                  given.is_packed,
                  given.activation};
  const dim3 grid(static_cast<unsigned>(given.config.tiles(given.dtype, given.m, given.n)),
                  static_cast<unsigned>(given.config.split_k));
  launch(linear_kernel<T, TM, kAligned>, grid, kLinearThreads, sizeof(Shared<T, TM>), stream, args);
}

template <class T>
void launch_of(const CudaLinearArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned_weight(args.dtype, args.weight, args.weight_stride, args.n);
  if (!aligned) return launch_linear<T, 1, false>(args, stream);
  switch (args.config.tokens) {
    case 1: return launch_linear<T, 1, true>(args, stream);
    case 4: return launch_linear<T, 4, true>(args, stream);
    default: return launch_linear<T, kLinearTokens, true>(args, stream);
  }
}

}  // namespace

void linear_cuda(const CudaLinearArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: return launch_of<float>(args, stream);
    case DType::kBFloat16: return launch_of<BFloat16>(args, stream);
    case DType::kFloat16: return launch_of<Float16>(args, stream);
    default: fail("actsparse_linear: there is no kernel for ", name(args.dtype));
  }
}

}  // namespace gossamer::actsparse
