#pragma once
// k-sparse codes over a vector vocabulary S (common/simd_*.h) and a storage type T. Registers run
// along the columns.
#include "actsparse/add_rows.h"
#include "actsparse/topk_unit.h"
#include "common/simd_finish.h"

namespace gossamer::actsparse::topk {
namespace {

constexpr bool is_bfloat16(BFloat16) { return true; }
template <class T>
constexpr bool is_bfloat16(T) {
  return false;
}

template <class S, class T>
struct Kernels {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kSliceRegisters = kSlice / kLanes;
  static constexpr int64_t kLine = 64 / sizeof(T);

  static int64_t begin_of(const int64_t* begins, int64_t k, int64_t bag) {
    return begins == nullptr ? bag * k : begins[bag];
  }

  // A few rows of one bag at a time, each in one piece, as prefetchers like them: sums that stayed
  // in registers would visit each row once for every few lines of it.
  static void sum(const Bags& b, int64_t first_bag, int64_t last_bag, int64_t first, int64_t last,
                  float* sums) {
    using Add = AddRows<S>;
    const T *matrix = static_cast<const T*>(b.matrix), *bias = static_cast<const T*>(b.bias);
    const auto* scales = static_cast<const float*>(b.scales);
    const int64_t pairs = begin_of(b.begins, b.k, last_bag);
    // Of one length, since as many columns are fetched of the next strip as are added of this one.
    const int64_t strips = (last - first + kStripColumns - 1) / kStripColumns;
    const int64_t strip = ((last - first + strips - 1) / strips + kSlice - 1) / kSlice * kSlice;
    for (int64_t bag = first_bag; bag < last_bag; ++bag) {
      const int64_t begin = begin_of(b.begins, b.k, bag), end = begin_of(b.begins, b.k, bag + 1);
      for (int64_t column = first; column < last; column += strip) {
        const int64_t columns = last - column < strip ? last - column : strip;
        T* out = static_cast<T*>(b.out) + bag * b.columns + column;
        const T* added = bias == nullptr ? nullptr : bias + column;
        if (begin == end && added == nullptr) __builtin_memset(out, 0, columns * sizeof(T));
        if (begin == end && added != nullptr) __builtin_memcpy(out, added, columns * sizeof(T));
        const auto zero = [](int64_t) GOSSAMER_INLINE { return S::zero(); };
        const auto load = [=](int64_t c) GOSSAMER_INLINE { return S::load(sums + c); };
        const auto store = [=](int64_t c, F sum, int64_t)
                               GOSSAMER_INLINE { S::store(sums + c, sum); };
        const auto finish = [=](int64_t c, F sum, int64_t count) GOSSAMER_INLINE {
          if (added != nullptr) sum = S::add(sum, Finish<S, T>::load_some(added + c, count));
          if (count == kLanes) return S::store(out + c, sum);
          T last[kLanes];
          S::store(last, sum);
          __builtin_memcpy(out + c, last, count * sizeof(T));
        };
        for (int64_t i = begin, to; i < end; i = to) {
          to = end - i < Add::kMost ? end : i + Add::kMost;
          const T *rows[Add::kMost], *ahead[Add::kMost];
          for (int64_t r = 0; r < to - i; ++r) {
            rows[r] = matrix + b.rows[i + r] * b.stride + column;
            // What is fetched meanwhile: a later row, of the next strip or bag if need be.
            int64_t later = i + r + Add::kMost, next = column;
            if (later >= end) next = column + columns < last ? column + columns : first;
            if (next > column) later -= end - begin;
            ahead[r] = later < pairs ? matrix + b.rows[later] * b.stride + next : rows[r];
          }
          const int count = static_cast<int>(to - i);
          const auto add = [&](const auto& start) {
            if (to < end) {
              Add::template add_rows<Add::kMost>(rows, scales + i, columns, ahead, start, store);
            } else {
              Add::template add_up_to<T>(count, rows, scales + i, columns, ahead, start, finish);
            }
          };
          i == begin ? add(zero) : add(load);
        }
      }
    }
  }

  // Of bfloat16 neighbours are taken apart, even columns in one register and odd ones in the next:
  // an instruction each, where keeping their order would cost two.
  static constexpr bool kPairs = is_bfloat16(T{});

  static void multiply_slice(const T* row, F scale, F (&sum)[kSliceRegisters]) {
    if constexpr (kPairs) {
#pragma GCC unroll 4
      for (int r = 0; r < kSliceRegisters; r += 2) {
        const auto pairs = S::load_words(reinterpret_cast<const uint32_t*>(row + r * kLanes));
        sum[r] = S::fma(scale, S::low(pairs, T{}), sum[r]);
        sum[r + 1] = S::fma(scale, S::high(pairs, T{}), sum[r + 1]);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kSliceRegisters; ++r) {
        sum[r] = S::fma(scale, S::load(row + r * kLanes), sum[r]);
      }
    }
  }

  static void sum_tile(const TileSums& task) {
    const T* tile = static_cast<const T*>(task.tile);
    for (int64_t bag = 0; bag < task.bags; ++bag) {
      float* to = task.sums + bag * kSlice;
      F sum[kSliceRegisters];
#pragma GCC unroll 8
      for (int r = 0; r < kSliceRegisters; ++r) {
        sum[r] = task.add ? S::load(to + r * kLanes) : S::zero();
      }
      const int64_t end = begin_of(task.begins, task.k, bag + 1);
      for (int64_t i = begin_of(task.begins, task.k, bag); i < end; ++i) {
        multiply_slice(tile + task.rows[i] * kSlice, S::set1(task.scales[i]), sum);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kSliceRegisters; ++r) S::store(to + r * kLanes, sum[r]);
    }
  }

  static void finish(const Epilogue& e, const float* sums, int64_t rows) {
    if constexpr (!kPairs) {
      Finish<S, T>::rows_first(e, sums, kSlice, rows);
    } else {
      constexpr int kTogether = 2 * kLanes;
      T bias[kSlice] = {};
      if (e.bias != nullptr) __builtin_memcpy(bias, e.bias, e.n * sizeof(T));
      for (int64_t row = 0; row < rows; ++row, sums += kSlice) {
        T padded[kSlice];
        T* to = static_cast<T*>(e.out) + row * e.out_stride;
        T* out = e.n == kSlice ? to : padded;
#pragma GCC unroll 4
        for (int c = 0; c < kSlice; c += kTogether) {
          F low = S::load(sums + c), high = S::load(sums + c + kLanes);
          if (e.bias != nullptr) {
            const auto added = S::load_words(reinterpret_cast<const uint32_t*>(bias + c));
            low = S::add(low, S::low(added, T{}));
            high = S::add(high, S::high(added, T{}));
          }
          S::store_words(reinterpret_cast<uint32_t*>(out + c), S::pair(low, high, T{}));
        }
        if (out == padded) __builtin_memcpy(to, padded, e.n * sizeof(T));
      }
    }
  }

  // Lane by lane the products of x with one row; x has zeros behind its last column.
  static F multiply(const float* x, const T* row, int64_t columns) {
    constexpr int kSums = 4;
    F sum[kSums];
#pragma GCC unroll 4
    for (F& s : sum) s = S::zero();
    int64_t c = 0;
    for (; c + kSums * kLanes <= columns; c += kSums * kLanes) {
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) {
        sum[s] = S::fma(S::load(x + c + s * kLanes), S::load(row + c + s * kLanes), sum[s]);
      }
    }
    for (; c + kLanes <= columns; c += kLanes) {
      sum[0] = S::fma(S::load(x + c), S::load(row + c), sum[0]);
    }
    if (c < columns) {
      T padded[kLanes] = {};
      __builtin_memcpy(padded, row + c, (columns - c) * sizeof(T));
      sum[0] = S::fma(S::load(x + c), S::load(padded), sum[0]);
    }
    return S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3]));
  }

  static void dot(const Dots& d, int64_t first_token, int64_t last_token, float* x) {
    for (int64_t c = 0; c < kLanes; ++c) x[d.columns + c] = 0;
    const int64_t pairs = last_token * d.k;
    for (int64_t t = first_token; t < last_token; ++t) {
      const T* from = static_cast<const T*>(d.x) + t * d.x_stride;
      int64_t c = 0;
      for (; c + kLanes <= d.columns; c += kLanes) S::store(x + c, S::load(from + c));
      for (; c < d.columns; ++c) x[c] = to_float(from[c]);
      T* out = static_cast<T*>(d.out) + t * d.k;
      for (int64_t first = 0; first < d.k; first += kLanes) {
        const int64_t count = d.k - first < kLanes ? d.k - first : kLanes;
        F lanes[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          if (j >= count) {
            lanes[j] = S::zero();
            continue;
          }
          const int64_t i = t * d.k + first + j;
          if (i + 1 < pairs) {  // its first lines; the rest follows by the hardware's own prefetch
            const T* ahead = static_cast<const T*>(d.matrix) + d.rows[i + 1] * d.stride;
            for (int64_t line = 0; line < d.columns && line < 16 * kLine; line += kLine) {
              __builtin_prefetch(ahead + line);
            }
          }
          lanes[j] = multiply(x, static_cast<const T*>(d.matrix) + d.rows[i] * d.stride, d.columns);
        }
        T y[kLanes];
        S::store(y, S::sum_lanes(lanes));
        __builtin_memcpy(out + first, y, count * sizeof(T));
      }
    }
  }

  static int64_t above(const void* row, int64_t& at, int64_t width, float limit, uint32_t* found,
                       int64_t room) {
    const T* dense = static_cast<const T*>(row);
    const F limits = S::set1(limit);
    int64_t count = 0;
    for (; at + kLanes <= width && count + kLanes <= room; at += kLanes) {
      for (uint32_t lanes = S::lanes_not_up_to(S::load(dense + at), limits); lanes != 0;
           lanes &= lanes - 1) {
        found[count++] = static_cast<uint32_t>(at + __builtin_ctz(lanes));
      }
    }
    for (; at < width && at + kLanes > width && count < room; ++at) {
      if (!(to_float(dense[at]) <= limit)) found[count++] = static_cast<uint32_t>(at);
    }
    return count;
  }

  static void widen(const void* from, int64_t count, float* to) {
    const T* values = static_cast<const T*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) S::store(to + i, S::load(values + i));
    for (; i < count; ++i) to[i] = to_float(values[i]);
  }

  static constexpr Unit unit = {sum, sum_tile, finish, dot, above, widen};
};

// Null for a dtype without kernels.
template <class S>
const Unit* unit_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Kernels<S, float>::unit;
    case DType::kBFloat16: return &Kernels<S, BFloat16>::unit;
    case DType::kFloat16: return &Kernels<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::actsparse::topk
