#pragma once
// k-sparse codes over a vector vocabulary S (common/simd_*.h) and a storage type T. Registers run
// along the columns; a bag's sums stay in registers while its rows go by.
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
  static constexpr int kWidest = kLanes == 16 ? 16 : 8;  // registers of sums
  static constexpr int kSliceRegisters = kSlice / kLanes;
  static constexpr int64_t kAhead = 6;  // rows that are fetched before they are met
  static constexpr int64_t kLine = 64 / sizeof(T);

  static int64_t begin_of(const int64_t* begins, int64_t k, int64_t bag) {
    return begins == nullptr ? bag * k : begins[bag];
  }

  static void store(T* out, F sum, const T* bias) {
    S::store(out, bias == nullptr ? sum : S::add(sum, S::load(bias)));
  }

  // kRegisters of columns from `column` on of one bag. What comes after its last row is fetched
  // too: the next columns of the bag, or the next bag, `next` columns on.
  template <int kRegisters>
  static void sum_block(const Bags& b, int64_t begin, int64_t end, int64_t column, int64_t pairs,
                        int64_t next, T* out) {
    const T* matrix = static_cast<const T*>(b.matrix) + column;
    const auto* scales = static_cast<const float*>(b.scales);
    F sum[kRegisters];
#pragma GCC unroll 16
    for (F& s : sum) s = S::zero();
    for (int64_t i = begin; i < end; ++i) {
      int64_t later = i + kAhead;
      const T* ahead = matrix;
      if (later >= end && next != 0) {
        later -= end - begin;
        ahead += next;
      }
      if (later < pairs) {
        ahead += b.rows[later] * b.stride;
#pragma GCC unroll 16
        for (int64_t c = 0; c < kRegisters * kLanes; c += kLine) __builtin_prefetch(ahead + c);
      }
      const T* row = matrix + b.rows[i] * b.stride;
      const F scale = S::set1(scales[i]);
#pragma GCC unroll 16
      for (int r = 0; r < kRegisters; ++r) {
        sum[r] = S::fma(scale, S::load(row + r * kLanes), sum[r]);
      }
    }
    const T* bias = b.bias == nullptr ? nullptr : static_cast<const T*>(b.bias) + column;
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r) {
      store(out + column + r * kLanes, sum[r], bias == nullptr ? nullptr : bias + r * kLanes);
    }
  }

  // The columns after the last whole register: the last kLanes columns of the matrix, or all of
  // them with zeros behind where there are fewer.
  static F load_last(const T* row, int64_t columns) {
    if (columns >= kLanes) return S::load(row + columns - kLanes);
    T padded[kLanes] = {};
    __builtin_memcpy(padded, row, columns * sizeof(T));
    return S::load(padded);
  }

  static void sum_last(const Bags& b, int64_t begin, int64_t end, T* out) {
    F sum = S::zero();
    for (int64_t i = begin; i < end; ++i) {
      const T* row = static_cast<const T*>(b.matrix) + b.rows[i] * b.stride;
      const F scale = S::set1(static_cast<const float*>(b.scales)[i]);
      sum = S::fma(scale, load_last(row, b.columns), sum);
    }
    if (b.bias != nullptr) {
      sum = S::add(sum, load_last(static_cast<const T*>(b.bias), b.columns));
    }
    T last[kLanes];
    S::store(last, sum);
    const int64_t rest = b.columns % kLanes;
    const T* from = b.columns >= kLanes ? last + kLanes - rest : last;
    __builtin_memcpy(out + b.columns - rest, from, rest * sizeof(T));
  }

  template <int kRegisters>
  static void sum_columns(const Bags& b, int64_t begin, int64_t end, int64_t column, int64_t last,
                          int64_t pairs, T* out) {
    constexpr int64_t kColumns = kRegisters * kLanes;
    for (; column + kColumns <= last; column += kColumns) {
      const int64_t next = column + 2 * kColumns <= last ? kColumns : 0;
      sum_block<kRegisters>(b, begin, end, column, pairs, next, out);
    }
    if constexpr (kRegisters > 1) {
      sum_columns<kRegisters / 2>(b, begin, end, column, last, pairs, out);
    }
  }

  static void sum(const Bags& b, int64_t first_bag, int64_t last_bag, int64_t first, int64_t last) {
    const int64_t pairs = begin_of(b.begins, b.k, last_bag);
    for (int64_t bag = first_bag; bag < last_bag; ++bag) {
      const int64_t begin = begin_of(b.begins, b.k, bag), end = begin_of(b.begins, b.k, bag + 1);
      T* out = static_cast<T*>(b.out) + bag * b.columns;
      sum_columns<kWidest>(b, begin, end, first, last, pairs, out);
      if (last == b.columns && last % kLanes != 0) sum_last(b, begin, end, out);
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
