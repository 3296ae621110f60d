#pragma once
// Rows of shared memory in pieces of 16 bytes, placed so that eight consecutive rows which ldmatrix
// reads at one piece lie in different banks.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/run.cuh"

namespace gossamer {

template <int kPieces>  // of a row: 4, or a multiple of 8
__device__ __forceinline__ int place_of(int row, int piece) {
  static_assert(kPieces == 4 || kPieces % 8 == 0);
  // Rows of 64 bytes share 128 by twos.
  return row * kPieces + (piece ^ (kPieces == 4 ? row / 2 % 4 : row % 8));
}

// That there are of a piece, where `left` elements of `kSize` bytes follow the row's first.
template <int kSize>
__device__ __forceinline__ int bytes_of(int left, int piece) {
  return min(max(kSize * left - 16 * piece, 0), 16);
}

// The first `bytes` of a piece, and zeros after them: 16 bytes at once where rows allow it, for
// cp_async_wait, or else through registers.
template <class T>
__device__ __forceinline__ void fill(uint4* shared, const T* global, int bytes, bool in_pieces) {
  if (in_pieces) {
    ptx::cp_async16(shared, global, bytes);
    return;
  }
  constexpr int kEach = 16 / sizeof(T);
  Run<T, kEach> piece;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    piece.at[i] = i * static_cast<int>(sizeof(T)) < bytes ? global[i] : T{};
  }
  *reinterpret_cast<Run<T, kEach>*>(shared) = piece;
}

// Whether rows of so many channels, `stride` elements apart, can be copied by pieces.
template <class T>
bool in_pieces(const void* data, int64_t stride, int64_t channels) {
  constexpr int64_t kEach = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kEach == 0 &&
         channels % kEach == 0;
}

}  // namespace gossamer
