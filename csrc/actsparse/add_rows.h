#pragma once
// How rows of W are added to sums: of one token where they lie, of several from a batch of strips.
//
// Written once over a vector vocabulary S (common/simd_*.h) and the storage type T.
#include "actsparse/unit.h"
#include "common/simd_finish.h"

// Of a lambda that is called in several places, where a call would cost as much as what it does.
#define GOSSAMER_INLINE __attribute__((always_inline))

namespace gossamer::actsparse {
namespace {

// sum[c] = start(c) + x[0] row[0][c] + x[1] row[1][c] + ..., each product added to the sum in turn,
// a register of columns at a time, which is handed to done(c, sum, how many of the lanes count).
// `ahead` is where a stream goes on after these columns, or null where nothing is to be fetched.
template <class S>
struct AddRows {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes, kMost = 8;

  template <int Count, class W, class Start, class Done>
  static void add_rows(const W* const* rows, const float* x, int64_t columns, const W* const* ahead,
                       const Start& start, const Done& done) {
    constexpr int kColumns = 64 / sizeof(W);
    const W* row[Count];
    F factor[Count];
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r) {
      row[r] = rows[r];
      factor[r] = S::set1(x[r]);
    }
    const auto add = [&](int64_t c) GOSSAMER_INLINE {
      F sum = start(c);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) sum = S::fma(factor[r], S::load(row[r] + c), sum);
      done(c, sum, kLanes);
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
      F sum = start(c);
#pragma GCC unroll 8
      for (int r = 0; r < Count; ++r) {
        sum = S::fma(factor[r], Finish<S, W>::load_some(row[r] + c, columns - c), sum);
      }
      done(c, sum, columns - c);
    }
  }
  template <class W, int Count = kMost, class Start, class Done>
  static void add_up_to(int count, const W* const* rows, const float* x, int64_t columns,
                        const W* const* ahead, const Start& start, const Done& done) {
    if (count == Count) return add_rows<Count>(rows, x, columns, ahead, start, done);
    if constexpr (Count > 1) {
      add_up_to<W, Count - 1>(count, rows, x, columns, ahead, start, done);
    }
  }
  // Of sums that lie at y.
  template <class W>
  static void add_to(int count, const W* const* rows, const float* x, float* y, int64_t columns,
                     const W* const* ahead) {
    add_up_to<W>(
        count, rows, x, columns, ahead, [y](int64_t c) GOSSAMER_INLINE { return S::load(y + c); },
        [y](int64_t c, F sum, int64_t) GOSSAMER_INLINE { S::store(y + c, sum); });
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
      AddRows<S>::template add_to<float>(count, of_token, share.x + i, y, columns, nullptr);
    }
  }
  static void put_in_order(float*, int64_t) {}  // they are
};

}  // namespace
}  // namespace gossamer::actsparse
