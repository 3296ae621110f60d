#pragma once
// outputs: a wanted row of W meets the tokens that want it while it is in the first-level cache.
//
// Written once over a vector vocabulary S (common/simd_*.h) and the storage type T.
#include "actsparse/unit.h"
#include "common/simd_finish.h"

namespace gossamer::actsparse {
namespace {

template <class S, class T>
struct OutputsKernels : Finish<S, T> {
  using Ends = Finish<S, T>;
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kLine = 64 / sizeof(T);  // columns

  static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  static void to_floats(const Tokens& x, int64_t k, float* floats) {
    for (int64_t t = 0; t < x.count; ++t, floats += k) {
      const T* row = static_cast<const T*>(x.data) + t * x.stride;
      for (int64_t i = 0; i < k; ++i) floats[i] = to_float(row[i]);
    }
  }

  // Four sums of each token hide the latency of reading, and as many tokens as there are registers
  // for share a vector of w.
  static constexpr int kSums = 4, kDots = kLanes == 16 ? 6 : 2;
  static constexpr int64_t kStep = kSums * kLanes;

  template <int Count>
  static void dots(const float* const* x, const T* w, int64_t k, const T* ahead, float* totals) {
    F sum[Count][kSums];
#pragma GCC unroll 6
    for (auto& token : sum) {
#pragma GCC unroll 4
      for (F& s : token) s = S::zero();
    }
    int64_t i = 0;
    for (; i + kStep <= k; i += kStep) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kStep; line += kLine) __builtin_prefetch(ahead + i + line);
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        const F weights = S::load(w + i + s * kLanes);
#pragma GCC unroll 6
        for (int t = 0; t < Count; ++t) {
          sum[t][s] = S::fma(S::load(x[t] + i + s * kLanes), weights, sum[t][s]);
        }
      }
    }
    for (; i < k; i += kLanes) {
      const int64_t count = min(kLanes, k - i);
      const F weights = Ends::load_some(w + i, count);
#pragma GCC unroll 6
      for (int t = 0; t < Count; ++t) {
        sum[t][0] = S::fma(Ends::load_some(x[t] + i, count), weights, sum[t][0]);
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < Count; ++t) {
      float lanes[kLanes], total = 0;
      S::store(lanes, S::add(S::add(sum[t][0], sum[t][1]), S::add(sum[t][2], sum[t][3])));
      for (float lane : lanes) total += lane;
      totals[t] = total;
    }
  }
  template <int Count = kDots>
  static void dots_up_to(int count, const float* const* x, const T* w, int64_t k, const T* ahead,
                         float* totals) {
    if (count == Count) return dots<Count>(x, w, k, ahead, totals);
    if constexpr (Count > 1) dots_up_to<Count - 1>(count, x, w, k, ahead, totals);
  }

  static void outputs(const OutputsTask& task) {
    const auto* weight = static_cast<const T*>(task.weight);
    const auto* bias = static_cast<const T*>(task.epilogue.bias);
    auto* out = static_cast<T*>(task.epilogue.out);
    for (int64_t i = 0; i < task.row_count; ++i) {
      const int64_t output = task.rows[i].k;
      const T* w = weight + output * task.weight_stride;
      const T* ahead = weight + task.rows[min(i + 1, task.row_count - 1)].k * task.weight_stride;
      const F added = S::set1(bias == nullptr ? 0.0f : to_float(bias[output]));
      for (uint64_t left = task.rows[i].tokens; left != 0;) {
        int count = 0;
        int64_t tokens[kDots];
        const float* x[kDots];
        for (; left != 0 && count < kDots; left &= left - 1, ++count) {
          tokens[count] = __builtin_ctzll(left);
          x[count] = task.x + tokens[count] * task.k;
        }
        float sums[kLanes] = {};
        dots_up_to(count, x, w, task.k, ahead, sums);
        T y[kLanes];
        S::store(y, Ends::activate(S::add(S::load(sums), added), task.epilogue.activation));
        for (int t = 0; t < count; ++t) out[tokens[t] * task.epilogue.out_stride + output] = y[t];
      }
    }
  }
};

}  // namespace
}  // namespace gossamer::actsparse
