// The decode kernel for weights of the type of x: bfloat16, float16, int8 and float8_e4m3fn.
#include "sparse24/gemm_decode_sm80.cuh"

namespace gossamer::sparse24 {
namespace {

// 16 bytes a lane are the A operand of a step.
template <class T, int kTokenTiles>
struct StoredWeights {
  using X = T;
  using Sum = ptx::Accumulator<T>;
  using R = Record<T>;
  static constexpr DType kType = DType::kBFloat16;  // which stands for all but int4
  static constexpr int kRowTiles = decode_row_tiles(8 * kTokenTiles, kType);
  static constexpr int kChunkSteps = 2, kAhead = 0, kRingBytes = 0;

  const DecodeArgs& args;
  const char* next[kRowTiles];  // the record that is loaded, at this lane's bytes
  uint64_t evict_first;
  uint32_t a[kRowTiles][R::kSteps][4], metadata[kRowTiles][4], next_metadata[kRowTiles][4];

  __device__ __forceinline__ StoredWeights(const DecodeArgs& args, int tile, int record, int last,
                                           unsigned char* /*ring*/)
      : args(args), evict_first(ptx::l2_evict_first()) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      next[i] = lane_record(args, tile + i, record, R::kBytes);
      if (record >= last) continue;
      load_weights(metadata[i], next[i] + R::kMetadata, evict_first);
#pragma unroll
      for (int step = 0; step < R::kSteps; ++step) {
        load_weights(a[i][step], next[i] + step * kFragmentBytes, evict_first);
      }
    }
  }

  __device__ __forceinline__ void advance(int /*record*/) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      next[i] += args.warps_k * R::kBytes;
      load_weights(next_metadata[i], next[i] + R::kMetadata, evict_first);
    }
  }

  template <class LoadX>
  __device__ __forceinline__ void multiply(Sum (&sum)[kRowTiles][kTokenTiles][4], int chunk,
                                           const LoadX& load_x, bool has_next) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int step = 2 * chunk + odd;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        uint32_t b[4];
        load_x(b, j, odd);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_step<T>(sum[i][j], a[i][step], b, metadata[i][metadata_word<T>(step)], step);
        }
      }
      if (has_next) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          load_weights(a[i][step], next[i] + step * kFragmentBytes, evict_first);
        }
      }
    }
  }

  __device__ __forceinline__ void rotate() { copy(metadata, next_metadata); }
};

template <class T>
struct Stored {
  template <int kTokenTiles>
  using Weights = StoredWeights<T, kTokenTiles>;
};

}  // namespace

void gemm_decode_sm80(const CudaGemmArgs& args, cudaStream_t stream) {
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_decode_of<Stored<T>::template Weights>(args, {}, stream);
  });
}

}  // namespace gossamer::sparse24
