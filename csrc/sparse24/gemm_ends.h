#pragma once
// The two ends that both kernels share: x comes in, a record of a row at a time, as the elements
// that the Multiply wants, and the bias and the activation make y of the sums. (S, T and Multiply:
// gemm_kernels.h.)
#include "common/simd_math.h"
#include "sparse24/gemm_unit.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct GemmEnds {
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

  // Of the `count` outputs from `first` on; those past n get 0.
  template <int kCount>
  static void load_bias(const Epilogue& e, int64_t first, float (&bias)[kCount]) {
    T padded[kCount] = {};
    const T* from = padded;
    if (e.bias != nullptr) {
      from = static_cast<const T*>(e.bias) + first;
      if (e.n - first < kCount) {
        __builtin_memcpy(padded, from, (e.n - first) * sizeof(T));
        from = padded;
      }
    }
    for (int i = 0; i < kCount; i += S::kLanes) S::store(bias + i, S::load(from + i));
  }

  static F activate(F y, Activation activation) {
    switch (activation) {
      case Activation::kNone: break;
      case Activation::kReLU: return S::where_negative(y, S::zero(), y);
      case Activation::kGELU: return gelu<S>(y);
      case Activation::kSiLU: return silu<S>(y);
    }
    return y;
  }
};

}  // namespace gossamer::sparse24
