#pragma once
// Rows of W against x, in two ways. Written once over a vector vocabulary S (common/simd_*.h), the
// storage type T of W, x and y and the type of its column numbers.
//
//   gather   lanes along a row of W, each with the x that its column names: for few rows of x,
//   whose
//            time is that of reading W
//   tokens   lanes along the rows of x, which lie in panels [k][tile]: a value meets all of them at
//            its column. A pass takes the columns whose part of a panel stays in a cache, and goes
//            through all rows of a block, whose sums wait in memory meanwhile.
#include "common/simd_finish.h"
#include "csr/unit.h"

namespace gossamer::csr {
namespace {

template <class S, class T, class Index>
struct Kernels : Finish<S, T> {
  using Ends = Finish<S, T>;
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int kLanes = S::kLanes;

  static const Index* columns(const Pattern& pattern) {
    return static_cast<const Index*>(pattern.col);
  }

  // Somebody may have written other columns since they were checked: then sums are wrong, and no
  // memory but that of x is read.
  static I load_columns(const Index* col, I last) {
    return S::min_unsigned(S::load_index(col), last);
  }

  // ---- gather ------------------------------------------------------------------------------
  template <int Tokens>
  static void add_gathered(const T* values, I col, const float* x, int64_t stride,
                           F (&sum)[Tokens]) {
    const F w = S::load(values);
#pragma GCC unroll 3
    for (int t = 0; t < Tokens; ++t) {
      sum[t] = S::fma(w, S::gather(x + t * stride, col), sum[t]);
    }
  }

  // The last places of a row, fewer than lanes. Those that are missing weigh 0 and name the 0
  // before x.
  template <int Tokens>
  static void add_rest(const T* values, const Index* col, int64_t j, int64_t end, int64_t nnz,
                       I last, const GatherTask& task, F (&sum)[Tokens]) {
    static constexpr uint32_t kPast[32] = {0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
                                           0,   0,   0,   0,   0,   ~0u, ~0u, ~0u, ~0u, ~0u, ~0u,
                                           ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
    T w[kLanes];
    Index c[kLanes];
    values += j, col += j;
    if (j + kLanes > nnz) {  // nothing is read behind the last ones of W
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t at = j + l < nnz ? l : 0;
        w[l] = values[at], c[l] = col[at];
      }
      values = w, col = c;
    }
    const I past = S::load_words(kPast + 16 - (end - j));
    const I kept = S::as_int(S::load(values));
    const F weight = S::as_float(S::sub(kept, S::and_(kept, past)));
    const I index = S::or_(load_columns(col, last), past);
#pragma GCC unroll 3
    for (int t = 0; t < Tokens; ++t) {
      sum[t] = S::fma(weight, S::gather(task.x + t * task.x_stride, index), sum[t]);
    }
  }

  template <int Tokens>
  static void gather_rows(const GatherTask& task) {
    const auto* values = static_cast<const T*>(task.values);
    const Index* col = columns(task.pattern);
    const int32_t* crow = task.pattern.crow;
    const int64_t nnz = task.pattern.nnz();
    const I last = S::set1(static_cast<uint32_t>(task.pattern.k - 1));
    for (int64_t first = task.first; first < task.last; first += kLanes) {
      const int64_t count = task.last - first < kLanes ? task.last - first : kLanes;
      F lanes[Tokens][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        F sum[Tokens];
#pragma GCC unroll 3
        for (F& s : sum) s = S::zero();
        int64_t j = i < count ? crow[first + i] : 0;
        const int64_t end = i < count ? crow[first + i + 1] : 0;
        for (; j + kLanes <= end; j += kLanes) {
          __builtin_prefetch(values + j + kAhead);
          __builtin_prefetch(col + j + kAhead);
          add_gathered(values + j, load_columns(col + j, last), task.x, task.x_stride, sum);
        }
        if (j < end) add_rest(values, col, j, end, nnz, last, task, sum);
#pragma GCC unroll 3
        for (int t = 0; t < Tokens; ++t) lanes[t][i] = sum[t];
      }
      float sums[Tokens][kLanes];
      for (int t = 0; t < Tokens; ++t) S::store(sums[t], S::sum_lanes(lanes[t]));
      Epilogue e = task.epilogue;
      if (e.bias != nullptr) e.bias = static_cast<const T*>(e.bias) + (first - task.first);
      e.out = static_cast<T*>(e.out) + (first - task.first);
      e.n = count;
      Ends::rows_first(e, sums[0], kLanes, Tokens);
    }
  }

  // Places whose bytes are fetched ahead: the hardware's own prefetch stops at the end of a page.
  static constexpr int kAhead = 512;
  static constexpr int kMostGathered = 3;
  template <int Tokens = kMostGathered>
  static void gather(const GatherTask& task) {
    if (task.tokens == Tokens) return gather_rows<Tokens>(task);
    if constexpr (Tokens > 1) gather<Tokens - 1>(task);
  }

  // ---- tokens ------------------------------------------------------------------------------
  static constexpr int kChunk = 128;

  // Some places of one row of W, of columns within a pass: where x has them, and the values.
  struct Places {
    int count;
    const float* values;
    int32_t offsets[kChunk + kLanes];
    float widened[kChunk + kLanes];
  };

  // Those from j on, before `end`, with columns below `limit`; of columns from `first` on. Where
  // places are taken in their order in memory, later ones are fetched ahead.
  static void take(const Pattern& pattern, const T* values, int64_t j, int64_t end, int64_t first,
                   int64_t limit, int tile, bool stream, Places& places) {
    const Index* col = columns(pattern);
    const int64_t nnz = pattern.nnz();
    const I before = S::set1(static_cast<uint32_t>(first));
    const I width = S::set1(static_cast<uint32_t>(limit - first));
    const I step = S::set1(static_cast<uint32_t>(tile));
    int count = 0;
    while (count < kChunk && j + count < end) {
      const int64_t at = j + count, left = end - at;
      Index c[kLanes];
      T w[kLanes];
      const Index* from = col + at;
      const T* from_values = values + at;
      if (stream) {
        __builtin_prefetch(from + kAhead);
        if (values != nullptr) __builtin_prefetch(from_values + kAhead);
      }
      if (at + kLanes > nnz) {  // the last ones of W
        const int64_t rest = nnz - at;
        for (int l = 0; l < kLanes; ++l) c[l] = l < rest ? from[l] : from[0];
        from = c;
        if (values != nullptr && sizeof(T) != sizeof(float)) {
          for (int l = 0; l < kLanes; ++l) w[l] = l < rest ? from_values[l] : from_values[0];
          from_values = w;
        }
      }
      const I in_pass = S::min_unsigned(S::sub(S::load_index(from), before), width);
      S::store_words(reinterpret_cast<uint32_t*>(places.offsets) + count, S::times(in_pass, step));
      if (sizeof(T) != sizeof(float) && values != nullptr) {
        S::store(places.widened + count, S::load(from_values));
      }
      constexpr uint32_t kAll = (1u << kLanes) - 1;
      uint32_t below = S::above(width, in_pass);
      if (left < kLanes) below &= (1u << left) - 1;
      if (below != kAll) {  // else the next ones need not wait for how many these are
        count += __builtin_ctz(~below);
        break;
      }
      count += kLanes;
    }
    places.count = count;
    if constexpr (sizeof(T) == sizeof(float)) {
      places.values = reinterpret_cast<const float*>(values) + j;
    } else {
      places.values = places.widened;
    }
  }

  // Calls body(row, panel, first column, place, places, fresh) for all places of some rows, pass by
  // pass; `fresh` for the first ones of a row, which may be none.
  template <class Body>
  static void walk(const Pattern& pattern, const T* values, int64_t first_row, int64_t last_row,
                   int64_t width, int tile, int panels, const Body& body) {
    constexpr int kRowsAhead = 6;  // rows whose places are fetched while others are computed
    const bool whole = width >= pattern.k && panels == 1;
    int32_t next[kBlockRows + kRowsAhead];
    const auto rows = static_cast<int>(last_row - first_row);
    for (int r = 0; r < rows + kRowsAhead; ++r) {
      next[r] = pattern.crow[r < rows ? first_row + r : last_row];
    }
    // Places of a row and pass on average, and a line of them more for where they begin.
    const int64_t mean = pattern.nnz() / pattern.n * width / pattern.k;
    const int64_t fetched = (mean < kChunk ? mean : kChunk) + 64 / sizeof(T);
    Places places;
    for (int64_t first = 0; first < pattern.k; first += width) {
      const int64_t limit = first + width < pattern.k ? first + width : pattern.k;
      for (int panel = 0; panel < panels; ++panel) {
        for (int r = 0; r < rows; ++r) {
          if (panel == 0 && !whole) {
            for (int64_t p = 0; p < fetched; p += 64 / sizeof(Index)) {
              __builtin_prefetch(columns(pattern) + next[r + kRowsAhead] + p);
            }
            for (int64_t p = 0; values != nullptr && p < fetched; p += 64 / sizeof(T)) {
              __builtin_prefetch(values + next[r + kRowsAhead] + p);
            }
          }
          int64_t j = next[r];
          const int64_t end = pattern.crow[first_row + r + 1];
          bool fresh = first == 0;
          do {
            take(pattern, values, j, end, first, limit, tile, whole, places);
            body(r, panel, first, j, places, fresh);
            j += places.count;
            fresh = false;
          } while (places.count >= kChunk);
          if (panel == panels - 1) next[r] = static_cast<int32_t>(j);
        }
      }
    }
  }

  // Few registers add up in several chains, or each place would wait for the one before it.
  template <int Registers>
  static void add(const Places& places, const float* x, bool fresh, float* sums) {
    constexpr int kChains = Registers >= 4 ? 1 : Registers >= 2 ? 2 : 4;
    F sum[kChains][Registers];
#pragma GCC unroll 8
    for (int i = 0; i < Registers; ++i) {
      sum[0][i] = fresh ? S::zero() : S::load(sums + i * kLanes);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum[c][i] = S::zero();
    }
    const auto add_place = [&](int j, F(&chain)[Registers]) {
      const float* at = x + places.offsets[j];
      const F value = S::broadcast(places.values + j);
#pragma GCC unroll 8
      for (int i = 0; i < Registers; ++i) {
        chain[i] = S::fma(value, S::load(at + i * kLanes), chain[i]);
      }
    };
    int j = 0;
    for (; j + kChains <= places.count; j += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add_place(j + c, sum[c]);
    }
    for (; j < places.count; ++j) add_place(j, sum[0]);
#pragma GCC unroll 8
    for (int i = 0; i < Registers; ++i) {
      if constexpr (kChains == 4) sum[1][i] = S::add(sum[1][i], S::add(sum[2][i], sum[3][i]));
      if constexpr (kChains > 1) sum[0][i] = S::add(sum[0][i], sum[1][i]);
      S::store(sums + i * kLanes, sum[0][i]);
    }
  }

  template <int Registers>
  static void tokens_tile(const TokensTask& task) {
    constexpr int kTile = Registers * kLanes;
    const Pattern& pattern = task.pattern;
    const int64_t panel_floats = pattern.k * kTile, sums_floats = int64_t{kBlockRows} * kTile;
    walk(pattern, static_cast<const T*>(task.values), task.first, task.last, task.width, kTile,
         task.panels,
         [&](int row, int panel, int64_t first, int64_t, const Places& places, bool fresh) {
           add<Registers>(places, task.x + panel * panel_floats + first * kTile, fresh,
                          task.sums + panel * sums_floats + row * kTile);
         });
    for (int panel = 0; panel < task.panels; ++panel) {
      Epilogue e = task.epilogue;
      e.out = static_cast<T*>(e.out) + int64_t{panel} * kTile * e.out_stride;
      const int64_t left = task.tokens - int64_t{panel} * kTile;
      Ends::all(e, task.sums + panel * sums_floats, kTile, left < kTile ? left : kTile,
                task.last - task.first);
    }
  }

  // ---- dvalues -----------------------------------------------------------------------------
  template <int Registers>
  static F dot(const F (&dy)[Registers], const float* x) {
    F sum = S::mul(dy[0], S::load(x));
#pragma GCC unroll 8
    for (int i = 1; i < Registers; ++i) sum = S::fma(dy[i], S::load(x + i * kLanes), sum);
    return sum;
  }

  template <int Registers>
  static void dvalues_tile(const DvaluesTask& task) {
    constexpr int kTile = Registers * kLanes;
    const auto dot_all = [&](int row, int, int64_t first, int64_t j, const Places& places, bool) {
      const float* x = task.x + first * kTile;
      const float* from = task.dy + (task.first + row) * kTile;
      F dy[Registers];
#pragma GCC unroll 8
      for (int i = 0; i < Registers; ++i) dy[i] = S::load(from + i * kLanes);
      for (int p = 0; p < places.count; p += kLanes) {
        const int count = places.count - p < kLanes ? places.count - p : kLanes;
        const int32_t* offsets = places.offsets + p;
        F lanes[kLanes];
        if (count == kLanes) {
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) lanes[l] = dot<Registers>(dy, x + offsets[l]);
        } else {
          for (int l = 0; l < count; ++l) lanes[l] = dot<Registers>(dy, x + offsets[l]);
          for (int l = count; l < kLanes; ++l) lanes[l] = S::zero();
        }
        F total = S::sum_lanes(lanes);
        float* to = task.sums + j + p;
        if (count == kLanes) {
          S::store(to, task.add ? S::add(S::load(to), total) : total);
        } else {
          float last[kLanes];
          S::store(last, total);
          for (int l = 0; l < count; ++l) to[l] = task.add ? to[l] + last[l] : last[l];
        }
      }
    };
    walk(task.pattern, nullptr, task.first, task.last, task.width, kTile, 1, dot_all);
    if (task.values == nullptr || sizeof(T) == sizeof(float)) return;
    int64_t j = task.pattern.crow[task.first];
    const int64_t end = task.pattern.crow[task.last];
    auto* values = static_cast<T*>(task.values);
    for (; j + kLanes <= end; j += kLanes) S::store(values + j, S::load(task.sums + j));
    if (j == end) return;
    float sums[kLanes] = {};
    T rounded[kLanes];
    for (int l = 0; l < end - j; ++l) sums[l] = task.sums[j + l];
    S::store(rounded, S::load(sums));
    for (int l = 0; l < end - j; ++l) values[j + l] = rounded[l];
  }

  static constexpr int kMostRegisters = 8;
  template <int Registers = kMostRegisters>
  static void tokens(const TokensTask& task) {
    if (task.tile == Registers * kLanes) return tokens_tile<Registers>(task);
    if constexpr (Registers > 1) tokens<Registers - 1>(task);
  }
  template <int Registers = kMostRegisters>
  static void dvalues(const DvaluesTask& task) {
    if (task.tile == Registers * kLanes) return dvalues_tile<Registers>(task);
    if constexpr (Registers > 1) dvalues<Registers - 1>(task);
  }
};

// What does not read columns of W, and the choice of those who do.
template <class S, class T>
struct Entries {
  using F = typename S::F;
  static constexpr int kLanes = S::kLanes;

  // Columns [begin, end) of a panel: [column][tile], the rows that there are not as zeros.
  static void pack(const Rows& x, int64_t begin, int64_t end, int tile, float* panel) {
    for (int row = 0; row < tile; row += kLanes) {
      const T* from = static_cast<const T*>(x.data) + row * x.stride;
      for (int64_t c = begin; c < end; c += kLanes) {
        const int64_t count = end - c < kLanes ? end - c : kLanes;
        typename S::I words[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          T padded[kLanes] = {};
          const T* at = padded;
          if (row + l < x.rows) {
            at = from + l * x.stride + c;
            if (count < kLanes) {
              __builtin_memcpy(padded, at, count * sizeof(T));
              at = padded;
            }
          }
          words[l] = S::as_int(S::load(at));
        }
        float* to = panel + c * tile + row;
        if (count == kLanes) {
          S::transpose(words, to, tile * int64_t{sizeof(float)});
          continue;
        }
        float square[kLanes][kLanes];
        S::transpose(words, square, sizeof square[0]);
        for (int l = 0; l < count; ++l) {
          __builtin_memcpy(to + l * int64_t{tile}, square[l], sizeof square[l]);
        }
      }
    }
  }

  static void widen(const void* from, int64_t count, float* to) {
    const auto* x = static_cast<const T*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) S::store(to + i, S::load(x + i));
    if (i == count) return;
    T padded[kLanes] = {};
    float widened[kLanes];
    __builtin_memcpy(padded, x + i, (count - i) * sizeof(T));
    S::store(widened, S::load(padded));
    __builtin_memcpy(to + i, widened, (count - i) * sizeof(float));
  }

  static void gather(const GatherTask& task) {
    task.pattern.wide ? Kernels<S, T, int32_t>::gather(task) : Kernels<S, T, int16_t>::gather(task);
  }
  static void tokens(const TokensTask& task) {
    task.pattern.wide ? Kernels<S, T, int32_t>::tokens(task) : Kernels<S, T, int16_t>::tokens(task);
  }
  static void dvalues(const DvaluesTask& task) {
    task.pattern.wide ? Kernels<S, T, int32_t>::dvalues(task)
                      : Kernels<S, T, int16_t>::dvalues(task);
  }

  static constexpr Unit unit = {
      .lanes = kLanes,
      .most_gathered = 3,  // measured on Emerald Rapids
      .most_registers = 8,
      .pack = pack,
      .widen = widen,
      .gather = gather,
      .tokens = tokens,
      .dvalues = dvalues,
  };
};

template <class S>
const Unit* unit_of_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Entries<S, float>::unit;
    case DType::kBFloat16: return &Entries<S, BFloat16>::unit;
    case DType::kFloat16: return &Entries<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::csr
