#pragma once
// linear, for a range of columns: several active rows of W stream by at once, and every column of y
// takes their products in the order of k.
//
//   W row 3   |----strip----|----strip----|--     One token: a line of each row is multiplied where
//   W row 7   |----strip----|----strip----|--     it lies, while the same line of the next strip,
//     ...                                         or of the next rows, is fetched.
//   y         |=============|=============|==     More: strips of a batch of rows are converted to
//                                                 float32, and each token adds its active ones.
//
// outputs: a wanted row of W meets the tokens that want it while it is in the first-level cache.
//
// Written once over a vector vocabulary S (common/simd_*.h) and the storage type T.
#include "actsparse/unit.h"
#include "common/simd_finish.h"

namespace gossamer::actsparse {
namespace {

template <class S, class T>
struct Kernels : Finish<S, T> {
  using Ends = Finish<S, T>;
  using F = typename S::F;
  using Bits = decltype([] {
    if constexpr (sizeof(T) == 4)
      return uint32_t{};
    else
      return uint16_t{};
  }());
  static constexpr int kLanes = S::kLanes;
  static constexpr int kGroup = 8;  // rows; as many streams as the prefetchers of a core follow
  static constexpr int kLine = 64 / sizeof(T);  // columns
  static constexpr int64_t kStripBytes = 1024;  // of a row: eight of them are on their way
  static constexpr int64_t kStrip = kStripBytes / sizeof(T);
  // Rows that several tokens meet at once, so that each has some of them active, and their columns:
  // in float32 they stay in the first-level cache.
  static constexpr int kBatch = 32;
  static constexpr int64_t kConverted = 256;
  // Columns whose sums of all tokens stay in a quarter of the second-level cache.
  static constexpr int64_t kSumsBytes = 512 << 10;

  static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  static Bits magnitude(const T* x) {
    Bits bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    return bits & static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
  }

  template <class W>
  static F load_some(const W* p, int64_t count) {
    W padded[kLanes] = {};
    __builtin_memcpy(padded, p, count * sizeof(W));
    return S::load(padded);
  }

  static int64_t find_of_one(const Tokens& x, int64_t first, int64_t k, ActiveRow* rows) {
    const T* from = static_cast<const T*>(x.data) + first;
    const auto threshold = S::as_int(S::set1(static_cast<float>(x.threshold)));
    ActiveRow* to = rows;
    for (int64_t i = 0; i < k; i += kLanes) {
      const F values = k - i < kLanes ? load_some(from + i, k - i) : S::load(from + i);
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

  // y[c] += x[0] row[0][c] + x[1] row[1][c] + ..., each product added to the sum in turn. `ahead`
  // is where a stream goes on after these columns, or null where nothing is to be fetched.
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
        sum = S::fma(factor[r], load_some(row[r] + c, columns - c), sum);
      }
      S::store(y + c, sum);
    }
  }
  template <class W, int Count = kGroup>
  static void add_up_to(int count, const W* const* rows, const float* x, float* y, int64_t columns,
                        const W* const* ahead) {
    if (count == Count) return add_rows<Count>(rows, x, y, columns, ahead);
    if constexpr (Count > 1) add_up_to<W, Count - 1>(count, rows, x, y, columns, ahead);
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
        add_up_to<T>(count, at, factors, y + c, min(kStrip, task.columns - c), ahead);
      }
    }
  }

  // What one token adds of a batch of rows.
  struct Share {
    int count;
    int8_t row[kBatch];
    float x[kBatch];
  };

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

  static void convert(const T* from, int64_t columns, float* to) {
    int64_t c = 0;
    for (; c + kLine <= columns; c += kLine) {
#pragma GCC unroll 8
      for (int i = 0; i < kLine; i += kLanes) S::store(to + c + i, S::load(from + c + i));
    }
    for (; c < columns; c += kLanes) {
      S::store(to + c, load_some(from + c, min(kLanes, columns - c)));
    }
  }

  static void add_tokens(const LinearTask& task, int64_t first, int64_t columns, float* sums,
                         int64_t stride) {
    alignas(64) float converted[kBatch][kConverted + kLanes];
    Share shares[kMostTokens];
    const T* weight = static_cast<const T*>(task.weight) + first;
    const auto row_at = [&](int64_t i) { return weight + task.rows[i].k * task.weight_stride; };
    for (int64_t batch = 0; batch < task.row_count; batch += kBatch) {
      const auto count = static_cast<int>(min(kBatch, task.row_count - batch));
      find_shares(task, batch, count, shares);
      for (int64_t c = 0; c < columns; c += kConverted) {
        const int64_t width = min(kConverted, columns - c);
        const bool last = c + kConverted >= columns;
        const T* ahead[kBatch];
        for (int r = 0; r < count; ++r) {
          const T* from = row_at(batch + r) + c;
          ahead[r] = last ? row_at(min(batch + kBatch + r, task.row_count - 1)) : from + kConverted;
          convert(from, width, converted[r]);
        }
        for (int64_t t = 0; t < task.x.count; ++t) {
          // Each token fetches its part of the next rows: all at once would be waited for.
          for (int64_t r = count * t / task.x.count; r < count * (t + 1) / task.x.count; ++r) {
            for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(ahead[r] + i, 0, 2);
          }
          const Share& share = shares[t];
          for (int i = 0; i < share.count; i += kGroup) {
            const int rows = static_cast<int>(min(kGroup, share.count - i));
            const float* of_token[kGroup];
            for (int r = 0; r < rows; ++r) of_token[r] = converted[share.row[i + r]];
            add_up_to<float>(rows, of_token, share.x + i, sums + t * stride + c, width, nullptr);
          }
        }
      }
    }
  }

  static int64_t block_columns(int64_t tokens, int64_t columns) {
    const int64_t most = kSumsBytes / (tokens * int64_t{sizeof(float)}) / kStrip * kStrip;
    return tokens == 1 ? columns : min(columns, most);
  }
  // Rows of sums are readable up to a whole register, and do not begin in the same place of a page.
  static int64_t sums_stride(int64_t tokens, int64_t columns) {
    return (block_columns(tokens, columns) + kLanes - 1) / kLanes * kLanes + 2 * kLanes;
  }
  static int64_t sums_bytes(int64_t tokens, int64_t columns) {
    return tokens * sums_stride(tokens, columns) * int64_t{sizeof(float)} + 4096;
  }

  static void linear(const LinearTask& task) {
    const int64_t tokens = task.x.count, block = block_columns(tokens, task.columns);
    const int64_t stride = sums_stride(tokens, task.columns);
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
        add_tokens(task, first, columns, sums, stride);
      }
      Epilogue e = task.epilogue;
      if (e.bias != nullptr) e.bias = static_cast<const T*>(e.bias) + first;
      e.out = static_cast<T*>(e.out) + first;
      e.n = columns;
      Ends::rows_first(e, sums, stride, tokens);
    }
  }

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
      const F weights = load_some(w + i, count);
#pragma GCC unroll 6
      for (int t = 0; t < Count; ++t) {
        sum[t][0] = S::fma(load_some(x[t] + i, count), weights, sum[t][0]);
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

  static constexpr Unit unit = {find_active, sums_bytes, linear, to_floats, outputs};
};

template <class S>
const Unit* unit_of_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Kernels<S, float>::unit;
    case DType::kBFloat16: return &Kernels<S, BFloat16>::unit;
    case DType::kFloat16: return &Kernels<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::actsparse
