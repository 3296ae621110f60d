// The exact float32 GEMM of a 2:4 weight: no tensor cores, every product and sum in float32.
//
//   y[m, n] = act(sum over kept k of x[m, k] W[n, k] + b[n])      x [M, K], W in panels
//   (sparse24.h)
//
// A lane owns a row of W, so that its index and values stay in its registers, and sums TM rows of x
// (tokens). A warp takes two blocks of 16 rows, and every word row of their panels is one coalesced
// load; a register is filled again for the next record as soon as it has been used.
//
//   grid    tiles of TM tokens x tile_n rows, times split_k ranges of K
//   block   tile_n / 32 x warps_k warps:    warp_n     0     1     2     3        (warps_k = 2)
//                                  warp_k 0   rows | 0-31|32-63|64-95|..127|   even records
//                                  warp_k 1        |     |     |     |     |   odd records
//
// x lies in shared memory by groups of four columns. A lane wants the column its index names, for
// all tokens, and the others of the warp want the same or one of the other three: 16 bytes of four
// tokens for each candidate, side by side, so whatever the indices are, the lanes read at most 64
// bytes in different banks.
//
//   x[quad of tokens][group][candidate][token within the quad]
//
// Everything is summed in a fixed order: lanes over their records, then the block over warp_k, then
// the last block of a tile to arrive over the ranges of K. The same call gives the same bits.
#include "common/activation.cuh"
#include "sparse24/gemm_cuda.h"
#include "sparse24/gemm_float32_config.h"

namespace gossamer::sparse24 {
namespace {

constexpr int kThreads = 32 * kFloat32Warps;
constexpr int kValueRows = 2 * kRecordGroups;
constexpr int kRecordWords = (1 + kValueRows) * kBlockN;
constexpr int kXFloats = 8192;  // 32 KB, so that shared memory does not limit float32_blocks

template <int TM>
struct Layout {
  static constexpr int kQuad = TM < 4 ? TM : 4;  // tokens of one access
  static constexpr int kQuads = TM / kQuad;
  static constexpr int kRecords = kXFloats / TM / kRecordK;  // of K that x is staged for at a time
  static constexpr int kGroups = kRecords * kRecordGroups;
  static constexpr int kGroupFloats = 4 * kQuad;
  static constexpr int kQuadFloats = kGroups * kGroupFloats;
};

template <int TM>
struct Shared {
  SharedTile<float, kXFloats> x;
  SharedTile<float, kFloat32Warps * 32 * TM> sums;  // [warp_k][token][row of the tile]
};

struct Args {
  int64_t m, n, k, blocks;     // blocks of 16 rows
  int records, split_records;  // of a block; of a split
  const uint32_t* panels;
  const float* x;
  int64_t x_stride;
  const float* bias;
  Activation activation;
  float* out;
  int tile_n, warps_k, split_k;
  float* workspace;
  int32_t* counters;
};

// What this block computes.
struct Tile {
  int64_t index;  // of the tile
  int64_t first_m, first_n;
  int split, begin, end;  // records; none where there are more splits than it takes
};

// Blocks of the same rows of W follow each other, so that all but the first read them from the L2.
template <int TM>
__device__ __forceinline__ Tile tile_of_block(const Args& args) {
  const unsigned tiles_m = static_cast<unsigned>((args.m + TM - 1) / TM);
  const unsigned m = blockIdx.x % tiles_m, rest = blockIdx.x / tiles_m;
  const unsigned splits = static_cast<unsigned>(args.split_k), n = rest / splits;
  Tile tile;
  tile.split = static_cast<int>(rest % splits);
  tile.index = int64_t{n} * tiles_m + m;
  tile.first_m = int64_t{m} * TM;
  tile.first_n = int64_t{n} * args.tile_n;
  tile.begin = min(tile.split * args.split_records, args.records);
  tile.end = min(tile.begin + args.split_records, args.records);
  return tile;
}

// ---- x into shared memory -----------------------------------------------------------------------

// A thread that stages a group of four tokens has 16 bytes of each of the four candidates to store.
// Candidate c lies at place c ^ (group / 2 mod 4): eight lanes with groups of their own then store
// into different banks. With fewer tokens a group is at most 32 bytes and keeps its order.
__device__ __forceinline__ int place_of(int candidate, int group) {
  return candidate ^ (group / 2 % 4);
}
// The same for all 16 slots of an index word at once: groups 0 to 7, four bits each.
template <int TM>
constexpr uint32_t kPlaces = TM < 4 ? 0u : 0xffaa5500u;

__device__ __forceinline__ float4 load_group(const Args& args, int64_t token, int64_t column) {
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (token >= args.m || column >= args.k) return v;
  const float* from = args.x + token * args.x_stride + column;
  if (column + 4 <= args.k) return __ldg(reinterpret_cast<const float4*>(from));
  v.x = from[0];
  if (column + 1 < args.k) v.y = from[1];
  if (column + 2 < args.k) v.z = from[2];
  return v;
}

// The groups [0, groups) from column `first` on. Tokens past M and columns past K are zeros.
template <int TM>
__device__ __forceinline__ void stage_x(float* x, const Args& args, int64_t first_m, int64_t first,
                                        int groups) {
  using L = Layout<TM>;
#pragma unroll 1  // four loads in flight are enough, and registers are short
  for (int quad = 0; quad < L::kQuads; ++quad) {
    for (int i = threadIdx.x; i < groups; i += blockDim.x) {
      float v[4][L::kQuad];  // [candidate][token]: the transposition is in the registers' names
#pragma unroll
      for (int t = 0; t < L::kQuad; ++t) {
        const float4 columns = load_group(args, first_m + quad * L::kQuad + t, first + 4 * i);
        v[0][t] = columns.x, v[1][t] = columns.y, v[2][t] = columns.z, v[3][t] = columns.w;
      }
      float* group = x + quad * L::kQuadFloats + i * L::kGroupFloats;
      if constexpr (L::kQuad == 4) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          *reinterpret_cast<float4*>(group + 4 * place_of(c, i)) =
              make_float4(v[c][0], v[c][1], v[c][2], v[c][3]);
        }
      } else if constexpr (L::kQuad == 2) {
        *reinterpret_cast<float4*>(group) = make_float4(v[0][0], v[0][1], v[1][0], v[1][1]);
        *reinterpret_cast<float4*>(group + 4) = make_float4(v[2][0], v[2][1], v[3][0], v[3][1]);
      } else {
        *reinterpret_cast<float4*>(group) = make_float4(v[0][0], v[1][0], v[2][0], v[3][0]);
      }
    }
  }
}

// The tokens of one candidate, `bytes` after x.
template <int Count>
__device__ __forceinline__ void load_shared(float (&to)[Count], const float* x, uint32_t bytes) {
  const void* from = reinterpret_cast<const unsigned char*>(x) + bytes;
  if constexpr (Count == 4) {
    const float4 v = *static_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (Count == 2) {
    const float2 v = *static_cast<const float2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *static_cast<const float*>(from);
  }
}

// ---- one record ---------------------------------------------------------------------------------

struct Record {
  uint32_t indices;
  uint32_t values[kValueRows];  // the bits of floats
};

// Adds a record's products to the sums; its x begins `x_bytes` after x. The registers are filled
// from `next`, if there `is_next`.
template <int TM>
__device__ __forceinline__ void multiply(float (&sum)[TM], Record& record, const float* x,
                                         uint32_t x_bytes, const uint32_t* next, bool is_next) {
  using L = Layout<TM>;
  constexpr int kShift = TM == 1 ? 2 : TM == 2 ? 3 : 4;  // the bytes of a candidate
  const uint32_t places = record.indices ^ kPlaces<TM>;
  if (is_next) record.indices = __ldg(next);
#pragma unroll
  for (int p = 0; p < kValueRows; ++p) {
    const float w = __uint_as_float(record.values[p]);
    if (is_next) record.values[p] = __ldg(next + (1 + p) * kBlockN);
    // Two bits cannot leave the group, whatever an unvalidated weight says. They are or-ed to where
    // the record begins, which takes one instruction with the mask.
    const uint32_t place = 2 * p < kShift ? places << (kShift - 2 * p) : places >> (2 * p - kShift);
    const uint32_t candidate = x_bytes | (place & 3u << kShift);
#pragma unroll
    for (int quad = 0; quad < L::kQuads; ++quad) {
      float tokens[L::kQuad];
      load_shared(tokens, x + p / 2 * L::kGroupFloats + quad * L::kQuadFloats, candidate);
#pragma unroll
      for (int t = 0; t < L::kQuad; ++t) {
        float& s = sum[quad * L::kQuad + t];
        s = __fmaf_rn(tokens[t], w, s);
      }
    }
  }
}

// ---- sums ---------------------------------------------------------------------------------------

// In order, so that the same call gives the same bits.
__device__ __forceinline__ float sum_of(const float* first, int count, int stride) {
  float total = first[0];
  for (int i = 1; i < count; ++i) total += first[int64_t{i} * stride];
  return total;
}

__device__ __forceinline__ void write(const Args& args, int64_t m, int64_t n, float total) {
  if (m >= args.m || n >= args.n) return;
  if (args.bias != nullptr) total += args.bias[n];
  args.out[m * args.n + n] = activate(total, args.activation);
}

// ---- the kernel ---------------------------------------------------------------------------------

template <int TM>
__global__ void __launch_bounds__(kThreads, float32_blocks(TM))
    gemm_float32_kernel(const Args args) {
  using L = Layout<TM>;
  Shared<TM>& shared = *shared_memory<Shared<TM>>();
  const Tile tile = tile_of_block<TM>(args);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps_n = args.tile_n / 32, warp_n = warp % warps_n, warp_k = warp / warps_n;

  // Rows past N read the last block's and are not written.
  const int64_t block = min(tile.first_n / kBlockN + 2 * warp_n + lane / 16, args.blocks - 1);
  int r = tile.begin + warp_k;
  const uint32_t* from = args.panels + (block * args.records + r) * kRecordWords + lane % 16;
  float sum[TM] = {};
  Record record = {};
  if (r < tile.end) {
    record.indices = __ldg(from);
#pragma unroll
    for (int p = 0; p < kValueRows; ++p) record.values[p] = __ldg(from + (1 + p) * kBlockN);
  }
  for (int begin = tile.begin; begin < tile.end; begin += L::kRecords) {
    const int end = min(begin + L::kRecords, tile.end);
    if (begin > tile.begin) __syncthreads();  // all have read the x that goes
    stage_x<TM>(shared.x.data(), args, tile.first_m, int64_t{begin} * kRecordK,
                (end - begin) * kRecordGroups);
    __syncthreads();
    for (; r < end; r += args.warps_k) {
      from += args.warps_k * kRecordWords;
      const uint32_t x_bytes =
          static_cast<uint32_t>(r - begin) * kRecordGroups * L::kGroupFloats * 4;
      multiply<TM>(sum, record, shared.x.data(), x_bytes, from, r + args.warps_k < tile.end);
    }
  }

  // The block's sums, over warp_k. A thread goes on with the row that it has and every warps_k-th
  // token; neighbouring threads have neighbouring rows of W, so of y.
  const int row = 32 * warp_n + lane, size = TM * args.tile_n;
  const int64_t n = tile.first_n + row;
  float* sums = shared.sums.data() + row;
#pragma unroll
  for (int t = 0; t < TM; ++t) sums[warp_k * size + t * args.tile_n] = sum[t];
  __syncthreads();
  float* partial = args.workspace + tile.index * args.split_k * size + row;
  for (int t = warp_k; t < TM; t += args.warps_k) {
    const float total = sum_of(sums + t * args.tile_n, args.warps_k, size);
    if (args.split_k == 1) {
      write(args, tile.first_m + t, n, total);
    } else {
      partial[tile.split * size + t * args.tile_n] = total;
    }
  }
  if (args.split_k == 1) return;

  // The blocks of a tile have left their sums in the workspace; the last to arrive adds them up.
  __threadfence();
  __syncthreads();
  int arrived = 0;
  if (threadIdx.x == 0) arrived = atomicAdd(&args.counters[tile.index], 1) + 1;
  if (__syncthreads_or(arrived == args.split_k) == 0) return;
  __threadfence();
  if (threadIdx.x == 0) args.counters[tile.index] = 0;
  for (int t = warp_k; t < TM; t += args.warps_k) {
    write(args, tile.first_m + t, n, sum_of(partial + t * args.tile_n, args.split_k, size));
  }
}

template <int TM>
void launch_gemm(const CudaGemmConfig& config, const Args& args, cudaStream_t stream) {
  const int64_t blocks = float32_tiles(config, args.m, args.n) * config.split_k;
  launch(gemm_float32_kernel<TM>, static_cast<unsigned>(blocks), config.tile_n * config.warps_k,
         sizeof(Shared<TM>), stream, args);
}

}  // namespace

void gemm_float32(const CudaGemmArgs& given, cudaStream_t stream) {
  const CudaGemmConfig& config = given.config;
  const auto records = static_cast<int>((given.k + kRecordK - 1) / kRecordK);
  const Args args{given.m,          given.n,
                  given.k,          (given.n + kBlockN - 1) / kBlockN,
                  records,          (records + config.split_k - 1) / config.split_k,
                  given.panels,     static_cast<const float*>(given.x),
                  given.x_stride,   static_cast<const float*>(given.bias),
                  given.activation, static_cast<float*>(given.out),
                  config.tile_n,    config.warps_k,
                  config.split_k,   static_cast<float*>(given.workspace),
                  given.counters};
  switch (config.tile_m) {
    case 1: return launch_gemm<1>(config, args, stream);
    case 2: return launch_gemm<2>(config, args, stream);
    case 4: return launch_gemm<4>(config, args, stream);
    case 8: return launch_gemm<8>(config, args, stream);
    case 16: return launch_gemm<16>(config, args, stream);
    default: throw std::runtime_error("gemm_float32: no kernel for that tile_m");
  }
}

}  // namespace gossamer::sparse24
