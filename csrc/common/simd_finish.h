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

  // What is added to the element of y at `out`.
  static const T* residual_of(const Epilogue& e, const T* out) {
    return reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(out) + e.residual);
  }

  // `count` of them, at most kLanes, and zeros.
  template <class W>
  static F load_some(const W* from, int64_t count) {
    if (count >= S::kLanes) return S::load(from);
    W padded[S::kLanes] = {};
    __builtin_memcpy(padded, from, count * sizeof(W));
    return S::load(padded);
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
    T* out = static_cast<T*>(e.out) + row * e.out_stride + first;
    alignas(64) float residual[kSquare][S::kLanes];
    if (e.residual != 0) {
      const T* from = residual_of(e, out);
      for (int i = 0; i < kSquare; i += S::kLanes) {
        transposed(from + i, e.out_stride, rows - row, outputs - first - i, residual[i]);
      }
    }
    const auto finished = [&](int output) {
      F sum = S::add(S::load(sums + output * sums_stride), S::set1(bias[output]));
      if (e.residual != 0) sum = S::add(sum, S::load(residual[output]));
      return activate(sum, e.activation);
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

  // A square of the residual, output by output; zeros past the rows and outputs that there are.
  static void transposed(const T* from, int64_t stride, int64_t rows, int64_t outputs, float* to) {
    typename S::I words[S::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < S::kLanes; ++i) {
      const bool there = i < rows && outputs > 0;
      words[i] = there ? S::as_int(load_some(from + i * stride, outputs)) : S::set1(0u);
    }
    S::transpose(words, to, S::kLanes * sizeof(float));
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
          F sum = S::add(S::load(sums + o * sums_stride + row), added);
          if (e.residual != 0) {
            sum = S::add(sum, load_some(residual_of(e, out + row), rows - row));
          }
          const F y = activate(sum, e.activation);
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
