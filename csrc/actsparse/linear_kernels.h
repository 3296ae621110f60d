#pragma once
// linear, for a range of columns: several active rows of W stream by at once, and every column of y
// takes their products in the order of k.
//
//   W row 3   |----strip----|----strip----|--     One token: a line of each row is multiplied where
//   W row 7   |----strip----|----strip----|--     it lies, while the same line of the next strip,
//     ...                                         or of the next rows, is fetched.
//   y         |=============|=============|==     More: strips of a batch of rows lie in the
//                                                 first-level cache, and each token adds its active
//                                                 ones.
//
// Written once over a vector vocabulary S (common/simd_*.h) and the storage type T.
#include "actsparse/add_rows.h"
#include "actsparse/unit.h"
#include "common/simd_finish.h"

namespace gossamer::actsparse {
namespace {

// FewUses: how several tokens add the rows of a batch that few of them have active.
template <class S, class T, class FewUses = Floats<S, T>>
struct LinearKernels : Finish<S, T> {
  using Ends = Finish<S, T>;
  using F = typename S::F;
  using Bits = decltype([] {
    if constexpr (sizeof(T) == 4)
      return uint32_t{};
    else
      return uint16_t{};
  }());
  static constexpr int kLanes = S::kLanes;
  static constexpr int kGroup = AddRows<S>::kMost;  // as many streams as prefetchers follow
  static constexpr int kLine = 64 / sizeof(T);      // columns
  static constexpr int64_t kStripBytes = 1024;      // of a row: eight of them are on their way
  static constexpr int64_t kStrip = kStripBytes / sizeof(T);
  // Columns whose sums of all tokens stay in a quarter of the second-level cache.
  static constexpr int64_t kSumsBytes = 512 << 10;

  static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  static Bits magnitude(const T* x) {
    Bits bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return bits & static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  }

  static int64_t find_of_one(const Tokens& x, int64_t first, int64_t k, ActiveRow* rows) {
    const T* from = static_cast<const T*>(x.data) + first;
    const auto threshold = S::as_int(S::set1(static_cast<float>(x.threshold)));
    ActiveRow* to = rows;
    for (int64_t i = 0; i < k; i += kLanes) {
      const F values = k - i < kLanes ? Ends::load_some(from + i, k - i) : S::load(from + i);
      const auto magnitudes = S::and_(S::as_int(values), S::set1(0x7fffffffu));
      for (uint32_t left = S::above(magnitudes, threshold); left != 0; left &= left - 1) {
        *to++ = {first + i + __builtin_ctz(left), 1};
      }
    }
    return to - rows;
  }

  // Magnitudes are in the order of their bits, infinity and NaN after all numbers.
  static int64_t find_active(const Tokens& x, int64_t first, int64_t k, ActiveRow* rows) {
    if (x.count == 1) return find_of_one(x, first, k, rows);
    T rounded;
    round_to(static_cast<float>(x.threshold), rounded);
    const Bits threshold = magnitude(&rounded);
    const T* from = static_cast<const T*>(x.data) + first;
    constexpr int64_t kChunk = 512;
    ActiveRow* to = rows;
    for (int64_t begin = 0; begin < k; begin += kChunk) {
      const int64_t count = min(kChunk, k - begin);
      uint64_t tokens[kChunk] = {};
      for (int64_t t = 0; t < x.count; ++t) {
        const T* row = from + t * x.stride + begin;
        for (int64_t i = 0; i < count; ++i) {
          tokens[i] |= static_cast<uint64_t>(magnitude(row + i) > threshold) << t;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        *to = {first + begin + i, tokens[i]};
        to += tokens[i] != 0;
      }
    }
    return to - rows;
  }

  static int count_of(const LinearTask& task, int64_t group) {
    return static_cast<int>(min(kGroup, task.row_count - group));
  }

  // Where the rows of a group lie; a group past the last one is said to lie where that does.
  static void find_rows(const LinearTask& task, int64_t group, const T* (&rows)[kGroup]) {
    for (int r = 0; r < kGroup; ++r) {
      const int64_t i = min(group + r, task.row_count - 1);
      rows[r] = static_cast<const T*>(task.weight) + task.rows[i].k * task.weight_stride;
    }
  }

  static void add_one_token(const LinearTask& task, float* y) {
    if (task.row_count == 0) return;  // there is no last one
    const T* x = static_cast<const T*>(task.x.data);
    const T* rows[kGroup];
    const T* following[kGroup];
    find_rows(task, 0, following);
    for (int64_t group = 0; group < task.row_count; group += kGroup) {
      const int count = count_of(task, group);
      float factors[kGroup];
      for (int r = 0; r < count; ++r) factors[r] = to_float(x[task.rows[group + r].k]);
      __builtin_memcpy(rows, following, sizeof rows);
      find_rows(task, group + kGroup, following);
      for (int64_t c = 0; c < task.columns; c += kStrip) {
        const T* at[kGroup];
        const T* ahead[kGroup];
        const bool last = c + kStrip >= task.columns;
        for (int r = 0; r < kGroup; ++r) {
          at[r] = rows[r] + c;
          ahead[r] = last ? following[r] : at[r] + kStrip;
        }
        AddRows<S>::template add_to<T>(count, at, factors, y + c, min(kStrip, task.columns - c),
                                       ahead);
      }
    }
  }

  static void find_shares(const LinearTask& task, int64_t batch, int count, Share* shares) {
    for (int64_t t = 0; t < task.x.count; ++t) shares[t].count = 0;
    for (int r = 0; r < count; ++r) {
      const ActiveRow& row = task.rows[batch + r];
      for (uint64_t left = row.tokens; left != 0; left &= left - 1) {
        const int64_t t = __builtin_ctzll(left);
        Share& share = shares[t];
        share.row[share.count] = static_cast<int8_t>(r);
        share.x[share.count++] =
            to_float(static_cast<const T*>(task.x.data)[t * task.x.stride + row.k]);
      }
    }
  }

  template <class Rows>
  static void add_tokens(const LinearTask& task, int64_t first, int64_t columns, float* sums,
                         int64_t stride) {
    constexpr int64_t kBatch = Rows::kBatch, kColumns = Rows::kColumns;
    Rows rows;
    Share shares[kMostTokens];
    const T* weight = static_cast<const T*>(task.weight) + first;
    const auto row_at = [&](int64_t i) { return weight + task.rows[i].k * task.weight_stride; };
    for (int64_t batch = 0; batch < task.row_count; batch += kBatch) {
      const auto count = static_cast<int>(min(kBatch, task.row_count - batch));
      find_shares(task, batch, count, shares);
      for (int64_t c = 0; c < columns; c += kColumns) {
        const int64_t width = min(kColumns, columns - c);
        const bool last = c + kColumns >= columns;
        const T* ahead[kBatch];
        for (int r = 0; r < count; ++r) {
          const T* from = row_at(batch + r) + c;
          ahead[r] = last ? row_at(min(batch + kBatch + r, task.row_count - 1)) : from + kColumns;
          rows.take(r, from, width);
        }
        for (int64_t t = 0; t < task.x.count; ++t) {
          // Each token fetches its part of the next rows: all at once would be waited for.
          for (int64_t r = count * t / task.x.count; r < count * (t + 1) / task.x.count; ++r) {
            for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(ahead[r] + i, 0, 2);
          }
          rows.add(shares[t], sums + t * stride + c, width);
        }
      }
    }
    for (int64_t t = 0; t < task.x.count; ++t) Rows::put_in_order(sums + t * stride, columns);
  }

  // How often tokens add a row, all together.
  static int64_t uses(const LinearTask& task) {
    int64_t count = 0;
    for (int64_t i = 0; i < task.row_count; ++i) count += __builtin_popcountll(task.rows[i].tokens);
    return count;
  }

  static int64_t block_columns(int64_t tokens, int64_t columns) {
    const int64_t most = kSumsBytes / (tokens * int64_t{sizeof(float)}) / kStrip * kStrip;
    return tokens == 1 ? columns : min(columns, most);
  }
  // Rows of sums are readable up to a whole line of W, and do not begin in the same place of a
  // page.
  static int64_t sums_stride(int64_t tokens, int64_t columns) {
    return (block_columns(tokens, columns) + kLine - 1) / kLine * kLine + 2 * kLanes;
  }
  static int64_t sums_bytes(int64_t tokens, int64_t columns) {
    return tokens * sums_stride(tokens, columns) * int64_t{sizeof(float)} + 4096;
  }

  static void linear(const LinearTask& task) {
    const int64_t tokens = task.x.count, block = block_columns(tokens, task.columns);
    const int64_t stride = sums_stride(tokens, task.columns);
    const bool few_uses = uses(task) <= FewUses::kMostUses * task.row_count;
    // A store and a load half a page apart never look like the same address to the core.
    const auto offset =
        reinterpret_cast<uintptr_t>(task.weight) + 2048 - reinterpret_cast<uintptr_t>(task.sums);
    float* sums = task.sums + offset % 4096 / 64 * 16;
    for (int64_t first = 0; first < task.columns; first += block) {
      const int64_t columns = min(block, task.columns - first);
      __builtin_memset(sums, 0, tokens * stride * sizeof(float));
      if (tokens == 1) {
        add_one_token(task, sums);
      } else {
        (few_uses ? add_tokens<FewUses> : add_tokens<Floats<S, T>>)(task, first, columns, sums,
                                                                    stride);
      }
      Epilogue e = task.epilogue;
      if (e.bias != nullptr) e.bias = static_cast<const T*>(e.bias) + first;
      e.out = static_cast<T*>(e.out) + first;
      e.n = columns;
      Ends::rows_first(e, sums, stride, tokens);
    }
  }
};

}  // namespace
}  // namespace gossamer::actsparse
