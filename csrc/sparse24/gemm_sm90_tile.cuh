#pragma once
// What the Hopper kernels of the 2:4 GEMM share: the records of Fragments (cuda.h) as wgmma.sp
// takes them, a ring of stages, and the end of a tile of
//
//   out[m, n] = act(x_scales[m] row_scales[n] sum over k of x[m, k] W[n, k]  +  bias[n])
//
// W is the sparse left operand of wgmma.sp and x its right one, so a block computes the transpose
// of a tile of `out`. Its consumers are two warpgroups; a slice is 64 rows of W, 16 of them a warp.
#include <cstdint>

#include "common/activation.cuh"
#include "common/check.h"
#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ring.cuh"
#include "sparse24/gemm_cuda.h"

namespace gossamer::sparse24 {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups: one multiplies while the other waits or stores

constexpr int kSliceRows = 64;   // of W: the M of wgmma
constexpr int kStepBytes = 128;  // of a row of x: the widest swizzle
constexpr int kEightRows = 8 * kStepBytes;

// The weights of a record, in uint4: for each step the fragments of two products, a uint4 a lane;
// then the metadata.
template <class T>
struct Record {
  static constexpr int kStepColumns = kStepBytes / sizeof(T);
  static constexpr int kSteps = kFragmentColumns / kStepColumns;
  static constexpr int kMetadata = 2 * kSteps * 32;
  static constexpr int kSize = kMetadata + 32;
};

// Only the consumers' warpgroups, each for itself.
__device__ __forceinline__ void sync_warpgroup() {
  ptx::barrier_sync(1 + threadIdx.x / kWarpgroup, kWarpgroup);
}

// float32, bfloat16 or float16 is asked for at run time: kernels of each would take minutes to
// compile, and it is a few instructions at the end of a tile.
struct Output {
  TensorMap map;
  bool by_tma;
  DType dtype;  // of the values and of the bias
  int64_t n;
  int m;
  void* values;
  const void* bias;
  const float *x_scales, *row_scales;
  Activation activation;

  __device__ bool staged() const { return dtype != DType::kFloat32; }
  __device__ float bias_of(int64_t row) const {
    switch (dtype) {
      case DType::kBFloat16: return ptx::to_float(static_cast<const BFloat16*>(bias)[row]);
      case DType::kFloat16: return ptx::to_float(static_cast<const Float16*>(bias)[row]);
      default: return static_cast<const float*>(bias)[row];
    }
  }
  __device__ uint32_t pack(float low, float high) const {
    return dtype == DType::kFloat16 ? ptx::pack<Float16>(low, high)
                                    : ptx::pack<BFloat16>(low, high);
  }
};

// 16-bit results go to `out` through shared memory, in tiles of [token][row of W] with the swizzle
// that TMA undoes.
template <int kTokens>
using ResultTile = SharedTile<uint16_t, kTokens * kSliceRows, 1024>;

// ---- a tile of the result -----------------------------------------------------------------------

template <class T>
constexpr bool kScaled = sizeof(T) == 1;

// What a lane of a slice has of `out`. Its register 4j + i: row 16 warp + g + 8 (i / 2) of W, token
// 8j + 2t + i mod 2.
template <class T, int kTokens>
struct Result {
  using Sum = ptx::Accumulator<T>;
  const Output& out;
  int64_t first_n;  // of this warp's 16 rows
  int first_m;      // of the tile
  float row_scale[2], bias[2];

  __device__ Result(const Output& out_, int64_t first_n_, int first_m_)
      : out(out_), first_n(first_n_), first_m(first_m_) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first_n + threadIdx.x % 32 / 4 + 8 * half;
      const bool scaled = kScaled<T> && out.row_scales != nullptr && n < out.n;
      row_scale[half] = scaled ? out.row_scales[n] : 1.0f;
      const bool biased = out.bias != nullptr && n < out.n;
      bias[half] = biased ? out.bias_of(n) : 0.0f;
    }
  }
  template <Activation kActivation>
  __device__ float finish(Sum sum, int token, int half) const {
    float y = static_cast<float>(sum);
    if constexpr (kScaled<T>) {
      const int m = first_m + token;
      y *= out.x_scales != nullptr && m < out.m ? out.x_scales[m] : 1.0f;
      y *= row_scale[half];
    }
    return activate(y + bias[half], kActivation);
  }

  // float32, straight to `out`: eight lanes write the 32 bytes of a sector. Activated where they
  // lie, one after the other, so that the code is there once and not for each sum.
  __device__ void store(const Sum (&sum)[kTokens / 2]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float* to = static_cast<float*>(out.values) + first_m * out.n + first_n + g;
    const auto there = [&](int token, int half) {
      return first_m + token < out.m && first_n + g + 8 * half < out.n;
    };
#pragma unroll
    for (int first = 0; first < kTokens; first += 8) {
      if (first_m + first >= out.m) break;  // as in stage()
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + 2 * t + i % 2, half = i / 2;
        if (!there(token, half)) continue;
        to[token * out.n + 8 * half] = finish<Activation::kNone>(sum[first / 2 + i], token, half);
      }
    }
    if (out.activation == Activation::kNone) return;
#pragma unroll 1
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + 2 * t + i % 2, half = i / 2 % 2;
      if (!there(token, half)) continue;
      float& y = to[token * out.n + 8 * half];
      y = activate(y, out.activation);
    }
  }

  // 16-bit types, to rows of 64 in shared memory, a token each, whose eight chunks of 16 bytes are
  // swizzled by the token: four transposed 8 x 8 matrices a store, [2 x 8 tokens][2 x 8 rows].
  template <Activation kActivation>
  __device__ void stage(const Sum (&sum)[kTokens / 2], uint16_t* tile) const {
    const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32 % 4;
    const int chunk = 2 * warp + lane / 8 % 2, row = lane / 16 * 8 + lane % 8;
    uint16_t* to = tile + row * kSliceRows + (chunk ^ lane % 8) * 8;
#pragma unroll
    for (int token = 0; token < kTokens; token += 16) {
      // Past the last token nothing is read. (It also keeps ptxas from computing all activations
      // side by side, for which there are no registers.)
      if (first_m + token >= out.m) break;
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = token + i / 2 * 8, half = i % 2, at = first / 2 + 2 * half;
        matrices[i] = out.pack(finish<kActivation>(sum[at], first + 2 * t, half),
                               finish<kActivation>(sum[at + 1], first + 2 * t + 1, half));
      }
      ptx::stmatrix_trans(to + token * kSliceRows, matrices);
    }
  }
};

// Rows of `out` that TMA cannot address: a warp writes the 64 elements of a token.
template <int kTokens>
__device__ void copy_out(const Output& out, const uint16_t* tile, int64_t first_n, int first_m) {
  uint16_t* to = static_cast<uint16_t*>(out.values) + first_m * out.n + first_n;
  for (int token = threadIdx.x / 32 % 4; token < min(kTokens, out.m - first_m); token += 4) {
#pragma unroll
    for (int row = threadIdx.x % 32; row < kSliceRows; row += 32) {
      if (first_n + row >= out.n) continue;
      to[token * out.n + row] = tile[token * kSliceRows + (row / 8 ^ token % 8) * 8 + row % 8];
    }
  }
}

// Writes what a warpgroup has of a tile: its rows of W from first_n on, tokens from first_m on.
template <class T, int kSlices, int kTokens>
__device__ void finish_tile(const ptx::Accumulator<T> (&sum)[kSlices][kTokens / 2],
                            ResultTile<kTokens> (&tiles)[kSlices], const Output& out,
                            int64_t first_n, int first_m) {
  const int thread = threadIdx.x % kWarpgroup;
  const auto result_of = [&](int slice) {
    return Result<T, kTokens>(out, first_n + slice * kSliceRows + thread / 32 * 16, first_m);
  };
  if (!out.staged()) {
#pragma unroll
    for (int i = 0; i < kSlices; ++i) result_of(i).store(sum[i]);
    return;
  }
  if (thread == 0) ptx::tma_store_wait_read<0>();  // until the last tile has left shared memory
  sync_warpgroup();
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    const auto result = result_of(i);
    uint16_t* tile = tiles[i].data();
    using A = Activation;
    switch (out.activation) {
      case A::kNone: result.template stage<A::kNone>(sum[i], tile); break;
      case A::kReLU: result.template stage<A::kReLU>(sum[i], tile); break;
      case A::kGELU: result.template stage<A::kGELU>(sum[i], tile); break;
      case A::kSiLU: result.template stage<A::kSiLU>(sum[i], tile); break;
    }
  }
  ptx::fence_proxy_async();
  sync_warpgroup();
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    const int64_t n = first_n + i * kSliceRows;
    if (n >= out.n) continue;
    uint16_t* tile = tiles[i].data();
    if (!out.by_tma) {
      copy_out<kTokens>(out, tile, n, first_m);
    } else if (thread == 0) {
      ptx::tma_store_2d(&out.map, tile, static_cast<int>(n), first_m);
    }
  }
  if (thread == 0) ptx::tma_store_commit();
}

// ---- x ------------------------------------------------------------------------------------------

// A matrix. Where a producer gets tiles of its rows from, a step at a time, is what it is for the
// kernels; a convolution has another (conv_sm90.cuh). What lies past the edges is zero there, and
// all bytes arrive.
struct MatrixMap {
  TensorMap map;

  struct Tile {
    const MatrixMap& x;
    int first;  // row

    __device__ Tile(const MatrixMap& x_, int first_) : x(x_), first(first_) {}
    // To all kBlocks of a cluster.
    template <int kBlocks>
    __device__ void load(void* to, uint64_t* full, int column) const {
      if constexpr (kBlocks == 1) {
        ptx::tma_load_2d(to, &x.map, full, column, first);
      } else {
        ptx::tma_load_2d_multicast(to, &x.map, full, column, first, (1 << kBlocks) - 1);
      }
    }
  };
};

// ---- for the launch -----------------------------------------------------------------------------

// Calls run(T{}) for the type of x. Those of 8 bits have units of their own, as each kernel takes
// seconds to compile.
//
// Hopper sums products of E4M3 with fewer bits than float32 has (about 14 of mantissa), so the
// rounding of a long sum grows with K; products of int8 are summed exactly.
template <class Run>
void with_16bit_types(const CudaGemmArgs& args, const Run& run) {
  GOSSAMER_CHECK(args.x_scales == nullptr && args.row_scales == nullptr,
                 "sparse24_gemm: scales with ", name(args.dtype), ", which has none");
  if (args.dtype == DType::kBFloat16) return run(BFloat16{});
  if (args.dtype == DType::kFloat16) return run(Float16{});
  fail("sparse24_gemm: the Hopper kernel has no ", name(args.dtype));
}
template <class Run>
void with_8bit_types(const CudaGemmArgs& args, const Run& run) {
  if (args.dtype == DType::kE4M3) return run(E4M3{});
  if (args.dtype == DType::kInt8) return run(int8_t{});
  fail("sparse24_gemm: the Hopper kernel has no ", name(args.dtype));
}

// x in steps of 128 bytes of `tokens` rows.
template <class T>
MatrixMap matrix_map(const CudaGemmArgs& args, int tokens) {
  const int64_t extents[] = {args.k, args.m};
  // The distance from a single row to the next is any, but a tensor map wants one it could take.
  constexpr int64_t kAligned = 16 / sizeof(T);
  const int64_t stride =
      args.m == 1 ? (args.k + kAligned - 1) / kAligned * kAligned : args.x_stride;
  const int64_t pitch[] = {stride * static_cast<int64_t>(sizeof(T))};
  const int box[] = {Record<T>::kStepColumns, tokens};
  return {tensor_map(args.x, sizeof(T), 2, extents, pitch, box, Swizzle::k128)};
}

inline Output output_of(const CudaGemmArgs& args, int tokens) {
  Output out{};
  out.dtype = args.out_dtype;
  const bool is_float32 = out.dtype == DType::kFloat32;
  GOSSAMER_CHECK(is_float32 || out.dtype == DType::kBFloat16 || out.dtype == DType::kFloat16,
                 "sparse24_gemm: the Hopper kernel has no ", name(args.dtype), " to ",
                 name(out.dtype));
  const int64_t pitch[] = {args.n * size_of(out.dtype)};
  out.by_tma = !is_float32 && pitch[0] % 16 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  if (out.by_tma) {
    const int64_t extents[] = {args.n, args.m};
    const int box[] = {kSliceRows, tokens};
    out.map = tensor_map(args.out, 2, 2, extents, pitch, box, Swizzle::k128);
  }
  out.n = args.n;
  out.m = static_cast<int>(args.m);
  out.values = args.out;
  out.bias = args.bias;
  out.x_scales = args.x_scales;
  out.row_scales = args.row_scales;
  out.activation = args.activation;
  return out;
}

}  // namespace
}  // namespace gossamer::sparse24
