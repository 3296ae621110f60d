#pragma once
// The two ends that both kernels share: x comes in, a record of a row at a time, as the elements
// that the Multiply wants, and the bias and the activation make y of the sums. (S, T and Multiply:
// gemm_kernels.h.)
#include "common/simd_finish.h"
#include "sparse24/gemm_unit.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct GemmEnds : Finish<S, T> {
  using F = typename S::F;
  using X = typename Multiply::X;
  static constexpr int kRecordLines = 1 + kRecordGroups * (sizeof(T) == 4 ? 2 : 1);  // of 64 bytes
  static constexpr int kRecordWords = kRecordLines * kBlockN;

  static void fetch(const XRows& x, int64_t row, int64_t k, X (&columns)[kRecordK]) {
    const T* from = static_cast<const T*>(x.data) + row * x.stride + k;
    if (row < x.rows && k + kRecordK <= x.k) return convert(from, columns);
    T padded[kRecordK] = {};
    for (int64_t i = 0; row < x.rows && i < kRecordK && k + i < x.k; ++i) padded[i] = from[i];
    convert(padded, columns);
  }
  static void convert(const T* from, X (&columns)[kRecordK]) {
    if constexpr (sizeof(X) == sizeof(T)) {
      __builtin_memcpy(columns, from, sizeof columns);
    } else {
      for (int i = 0; i < kRecordK; i += S::kLanes) S::store(columns + i, S::load(from + i));
    }
  }
};

}  // namespace gossamer::sparse24
