#pragma once
// How rows of W are added to sums: of one token where they lie, of several from a batch of strips.
//
// Written once over a vector vocabulary S (common/simd_*.h) and the storage type T.
#include "actsparse/unit.h"
#include "common/simd_finish.h"

namespace gossamer::actsparse {
namespace {

// y[c] += x[0] row[0][c] + x[1] row[1][c] + ..., each product added to the sum in turn. `ahead` is
// where a stream goes on after these columns, or null where nothing is to be fetched.
template <class S>
struct AddRows {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes, kMost = 8;

  template <int Count, class W>
  static void add_rows(const W* const* rows, const float* x, float* y, int64_t columns,
                       const W* const* ahead) {
    constexpr int kColumns = 64 / sizeof(W);
    const W* row[Count];
    F factor[Count];
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      row[r] = rows[r];
      factor[r] = S::set1(x[r]);
    }
    const auto add = [&](int64_t c) {
      F sum = S::load(y + c);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) sum = S::fma(factor[r], S::load(row[r] + c), sum);
      S::store(y + c, sum);
    };
    int64_t c = 0;
    if (ahead != nullptr) {
      for (; c + kColumns <= columns; c += kColumns) {
#pragma GCC unroll 8
        for (int r = 0; r < Count; ++r) __builtin_prefetch(ahead[r] + c);
#pragma GCC unroll 8
        for (int i = 0; i < kColumns; i += kLanes) add(c + i);
      }
    }
    for (; c + kLanes <= columns; c += kLanes) add(c);
    if (c < columns) {
      F sum = S::load(y + c);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        sum = S::fma(factor[r], Finish<S, W>::load_some(row[r] + c, columns - c), sum);
      }
      S::store(y + c, sum);
    }
  }
  template <class W, int Count = kMost>
  static void add_up_to(int count, const W* const* rows, const float* x, float* y, int64_t columns,
                        const W* const* ahead) {
    if (count == Count) return add_rows<Count>(rows, x, y, columns, ahead);
    if constexpr (Count > 1) add_up_to<W, Count - 1>(count, rows, x, y, columns, ahead);
  }
};

// What one token adds of a batch of rows.
struct Share {
  static constexpr int kMost = 64;
  int count;
  int8_t row[kMost];
  float x[kMost];
};

// The rows of a batch, strips of them converted to float32.
template <class S, class T>
struct Floats {
  // So many that each token has some of them active; they stay in the first-level cache.
  static constexpr int kBatch = 32;
  static constexpr int64_t kColumns = 256, kMostUses = kMostTokens;
  alignas(64) float rows[kBatch][kColumns + S::kLanes];

  void take(int row, const T* from, int64_t columns) {
    int64_t c = 0;
#pragma GCC unroll 4
    for (; c + S::kLanes <= columns; c += S::kLanes) S::store(rows[row] + c, S::load(from + c));
    if (c < columns) S::store(rows[row] + c, Finish<S, T>::load_some(from + c, columns - c));
  }
  void add(const Share& share, float* y, int64_t columns) const {
    constexpr int kMost = AddRows<S>::kMost;
    for (int i = 0; i < share.count; i += kMost) {
      const int count = share.count - i < kMost ? share.count - i : kMost;
      const float* of_token[kMost];
      for (int r = 0; r < count; ++r) of_token[r] = rows[share.row[i + r]];
      AddRows<S>::template add_up_to<float>(count, of_token, share.x + i, y, columns, nullptr);
    }
  }
  static void put_in_order(float*, int64_t) {}  // they are
};

}  // namespace
}  // namespace gossamer::actsparse
