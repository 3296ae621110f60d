#pragma once
// Epilogues over a vector vocabulary S and a storage type T, for sums that lie output by output,
// sums[output][row], unless they say otherwise. Included by units of one instruction set.
#include "common/epilogue.h"
#include "common/simd_math.h"

namespace gossamer {
namespace {

template <class S, class T>
struct Finish {
  using F = typename S::F;

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

  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr int kSquare = S::kLanes * kPerWord;  // outputs

  // A square of kLanes rows by as many words of y is finished, rounded and then transposed. Where
  // the outputs or rows that there are end inside the square, the sums past them are whatever the
  // memory holds, and are not written.
  static void square(const Epilogue& e, const float* all_sums, int64_t sums_stride, int64_t row,
                     int64_t rows, int64_t first, int64_t outputs) {
    const float* sums = all_sums + first * sums_stride + row;
    float bias[kSquare];
    load_bias(e, first, bias);
    const auto finished = [&](int output) {
      const F sum = S::load(sums + output * sums_stride);
      return activate(S::add(sum, S::set1(bias[output])), e.activation);
    };
    typename S::I words[S::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      if constexpr (kPerWord == 1) {
        words[i] = S::as_int(finished(i));
      } else {
        words[i] = S::pair(finished(2 * i), finished(2 * i + 1), T{});
      }
    }
    T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
    if (outputs - first >= kSquare && rows - row >= S::kLanes) {
      return S::transpose(words, out, e.out_stride * sizeof(T));
    }
    alignas(64) T square[S::kLanes][kSquare];
    S::transpose(words, square, sizeof square[0]);
    const int64_t count = outputs - first < kSquare ? outputs - first : kSquare;
    for (int64_t i = 0; i < rows - row && i < S::kLanes; ++i) {
      __builtin_memcpy(out + i * e.out_stride, square[i], count * sizeof(T));
    }
  }

  // All of sums[outputs][rows]. Rows outside, so that neighbouring outputs of a row are written
  // soon after each other. Reads up to a square past either end of the sums.
  static void all(const Epilogue& e, const float* sums, int64_t sums_stride, int64_t rows,
                  int64_t outputs) {
    for (int64_t row = 0; row < rows; row += S::kLanes) {
      for (int64_t first = 0; first < outputs; first += kSquare) {
        square(e, sums, sums_stride, row, rows, first, outputs);
      }
    }
  }

  // All of sums[rows][e.n], rows of them sums_stride apart and readable up to a whole register.
  static void rows_first(const Epilogue& e, const float* sums, int64_t sums_stride, int64_t rows) {
    for (int64_t first = 0; first < e.n; first += S::kLanes) {
      float bias[S::kLanes];
      load_bias(e, first, bias);
      const F added = S::load(bias);
      for (int64_t row = 0; row < rows; ++row) {
        const F sum = S::load(sums + row * sums_stride + first);
        const F y = activate(S::add(sum, added), e.activation);
        T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
        if (first + S::kLanes <= e.n) {
          S::store(out, y);
        } else {
          T padded[S::kLanes];
          S::store(padded, y);
          __builtin_memcpy(out, padded, (e.n - first) * sizeof(T));
        }
      }
    }
  }

  // The same into y whose outputs come first, rows of it being out_stride apart.
  static void outputs_first(const Epilogue& e, const float* sums, int64_t sums_stride, int64_t rows,
                            int64_t outputs) {
    for (int64_t first = 0; first < outputs; first += S::kLanes) {
      float bias[S::kLanes];
      load_bias(e, first, bias);
      for (int64_t o = first; o < outputs && o < first + S::kLanes; ++o) {
        const F added = S::set1(bias[o - first]);
        T* out = static_cast<T*>(e.out) + o * e.out_stride;
        for (int64_t row = 0; row < rows; row += S::kLanes) {
          const F y = activate(S::add(S::load(sums + o * sums_stride + row), added), e.activation);
          if (row + S::kLanes <= rows) {
            S::store(out + row, y);
          } else {
            T padded[S::kLanes];
            S::store(padded, y);
            __builtin_memcpy(out + row, padded, (rows - row) * sizeof(T));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace gossamer
