// Conversions between the dense matrix, the portable format and the panels.
#include "sparse24/pack.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/target.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {
namespace {

// What the eight weights of one index byte keep, by the mask of their non-zeros: the mask with
// every group filled up to two, and the index byte. `fits` says that no group held more than two.
struct Kept {
  uint8_t mask, index_byte;
  bool fits;
};

constexpr Kept kept_of(unsigned nonzero) {
  Kept kept{0, 0, true};
  for (int group = 0; group < 2; ++group) {
    const unsigned nibble = nonzero >> (4 * group) & 15u;
    unsigned chosen = 0;
    int count = 0;
    for (int i = 0; i < 4; ++i) {
      if (nibble >> i & 1u)
        count < 2 ? (void)(chosen |= 1u << i, ++count) : (void)(kept.fits = false);
    }
    for (int i = 0; i < 4 && count < 2; ++i) {
      if (!(chosen >> i & 1u)) chosen |= 1u << i, ++count;
    }
    int slot = 0;
    for (unsigned i = 0; i < 4; ++i) {
      if (chosen >> i & 1u) kept.index_byte |= static_cast<uint8_t>(i << (4 * group + 2 * slot++));
    }
    kept.mask |= static_cast<uint8_t>(chosen << (4 * group));
  }
  return kept;
}

constexpr PackTables make_tables() {
  PackTables tables{};
  for (unsigned nonzero = 0; nonzero < 256; ++nonzero) {
    const Kept kept = kept_of(nonzero);
    tables.kept_mask[nonzero] = kept.mask;
    tables.index_byte[nonzero] = kept.index_byte;
    tables.fits[nonzero] = kept.fits;
    if (kept.fits) tables.mask_of_index[kept.index_byte] = kept.mask;
  }
  return tables;
}

// By its bits, since a thread that flushes denormals would compare them equal to 0; -0.0 too.
template <class T>
bool is_zero(T x) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, Word>;
  return static_cast<Bits>(std::bit_cast<Bits>(x) << 1) == 0;
}

// The portable loops: one row, from index byte `first_byte` on. What the wide units leave over.
template <class T>
bool from_dense_row(const T* dense, int64_t k, int64_t first_byte, T* values, uint8_t* indices) {
  const int64_t groups = (k + 3) / 4;
  bool fits = true;
  for (int64_t b = first_byte; 2 * b < groups; ++b) {
    unsigned nonzero = 0;
    for (int i = 0; i < 8 && 8 * b + i < k; ++i) nonzero |= !is_zero(dense[8 * b + i]) << i;
    fits &= kPackTables.fits[nonzero];
    const bool half = 2 * b + 1 == groups;
    const uint8_t mask = kPackTables.kept_mask[nonzero] & (half ? 15 : 255);
    indices[b] = kPackTables.index_byte[nonzero] & (half ? 15 : 255);
    T* slot = values + 4 * b;
    for (int i = 0; i < 8; ++i) {
      if (!(mask >> i & 1)) continue;
      const bool keep = nonzero >> i & 1;  // a filled slot, and -0.0, is a plain 0
      *slot++ = keep ? dense[8 * b + i] : T{};
    }
  }
  return fits;
}

template <class T>
void gather_row(const T* dense, const uint8_t* indices, int64_t k, int64_t first_byte, T* values) {
  for (int64_t p = 4 * first_byte; p < 2 * ((k + 3) / 4); ++p) {
    const int64_t column = p / 2 * 4 + (indices[p / 4] >> (2 * (p % 4)) & 3);
    values[p] = column < k ? dense[column] : T{};
  }
}

template <class T>
void to_dense_row(const T* values, const uint8_t* indices, int64_t k, int64_t first_byte,
                  T* dense) {
  const int64_t groups = (k + 3) / 4;
  for (int64_t column = 8 * first_byte; column < k; ++column) dense[column] = T{};
  for (int64_t p = 4 * first_byte; p < 2 * groups; ++p) {
    const int64_t column = p / 2 * 4 + (indices[p / 4] >> (2 * (p % 4)) & 3);
    if (column < k) dense[column] = values[p];
  }
}

int64_t dense_bytes(const Weight& w) { return w.n * w.k * size_of(w.dtype); }

const PackRows* wide_rows() {
#ifdef GOSSAMER_X86
  if (target() >= Target::kAVX2) return &pack_rows_avx2;
#endif
  return nullptr;
}

// Index bytes whose eight columns and two groups all exist: what the wide units may touch.
int64_t whole_bytes(const Weight& w) { return w.k / 8; }

// Counts the over-full groups and finds the first, for the error message.
template <class T>
void report_misfits(const T* dense, const Weight& w) {
  int64_t count = 0, row = -1, group = -1;
  for (int64_t n = 0; n < w.n; ++n) {
    for (int64_t g = 0; g < w.groups(); ++g) {
      int nonzero = 0;
      for (int64_t k = 4 * g; k < 4 * g + 4 && k < w.k; ++k)
        nonzero += !is_zero(dense[n * w.k + k]);
      if (nonzero <= 2) continue;
      if (count++ == 0) row = n, group = g;
    }
  }
  fail_not_24(w, count, row * w.groups() + group);
}

}  // namespace

constinit const PackTables kPackTables = make_tables();

void fail_not_24(const Weight& w, int64_t count, int64_t first) {
  const int64_t row = first / w.groups(), column = 4 * (first % w.groups());
  const int64_t last = column + 3 < w.k ? column + 3 : w.k - 1;
  fail("Sparse24.from_dense: the weight is not 2:4: ", count, " of ", w.n * w.groups(),
       " groups of 4 hold more than 2 non-zeros, the first at row ", row, ", columns ", column,
       " to ", last, "; prune it first (gossamer.prune.magnitude_24)");
}

void fail_indices(const Weight& w, int64_t first, int byte) {
  fail("Sparse24: invalid indices at row ", first / w.groups(), ", group ", first % w.groups(),
       " (byte ", byte,
       "): a nibble is idx0 | idx1 << 2 with idx0 < idx1 < 4, an index past the last column holds "
       "the value 0, and an unused nibble is 0");
}

void from_dense(const void* dense, const Weight& w, void* values, uint8_t* indices, int threads) {
  visit_floats(w.dtype, [&]<class T>(T) {
    std::atomic<bool> misfit{false};
    const auto* source = static_cast<const T*>(dense);
    auto* kept = static_cast<T*>(values);
    const PackRows* wide = wide_rows();
    parallel_ranges(threads_for_bytes(threads, dense_bytes(w)), w.n,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t n = begin; n < end; ++n) {
                        const T* row = source + n * w.k;
                        T* row_values = kept + n * 2 * w.groups();
                        uint8_t* row_indices = indices + n * w.index_bytes();
                        int64_t done = 0;
                        bool fits = true;
                        if (wide != nullptr && sizeof(T) <= 4) {
                          done = whole_bytes(w);
                          fits = (sizeof(T) == 4 ? wide->from_dense_32 : wide->from_dense_16)(
                              row, done, row_values, row_indices);
                        }
                        fits &= from_dense_row(row, w.k, done, row_values, row_indices);
                        if (!fits) misfit.store(true, std::memory_order_relaxed);
                      }
                    });
    if (misfit) report_misfits(source, w);
  });
}

void gather(const void* dense, const Weight& w, void* values, int threads) {
  visit_floats(w.dtype, [&]<class T>(T) {
    const PackRows* wide = wide_rows();
    parallel_ranges(
        threads_for_bytes(threads, dense_bytes(w)), w.n, [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const T* row = static_cast<const T*>(dense) + n * w.k;
            const uint8_t* indices = w.indices + n * w.index_bytes();
            T* kept = static_cast<T*>(values) + n * 2 * w.groups();
            int64_t done = 0;
            if (wide != nullptr && sizeof(T) <= 4) {
              done = whole_bytes(w);
              (sizeof(T) == 4 ? wide->gather_32 : wide->gather_16)(row, indices, done, kept);
            }
            gather_row(row, indices, w.k, done, kept);
          }
        });
  });
}

void to_dense(const Weight& w, void* dense, int threads) {
  visit_floats(w.dtype, [&]<class T>(T) {
    const PackRows* wide = wide_rows();
    parallel_ranges(
        threads_for_bytes(threads, dense_bytes(w)), w.n, [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const T* values = static_cast<const T*>(w.values) + n * 2 * w.groups();
            const uint8_t* indices = w.indices + n * w.index_bytes();
            T* row = static_cast<T*>(dense) + n * w.k;
            int64_t done = 0;
            if (wide != nullptr && sizeof(T) <= 4) {
              done = whole_bytes(w);
              (sizeof(T) == 4 ? wide->to_dense_32 : wide->to_dense_16)(values, indices, done, row);
            }
            to_dense_row(values, indices, w.k, done, row);
          }
        });
  });
}

void validate(const Weight& w, int threads) {
  std::atomic<int64_t> first{w.n * w.groups()};
  const auto lower_first = [&](int64_t position) {
    int64_t known = first.load();
    while (position < known && !first.compare_exchange_weak(known, position)) {
    }
  };
  visit_floats(w.dtype, [&]<class T>(T) {
    parallel_ranges(
        threads_for_bytes(threads, dense_bytes(w)), w.n, [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const uint8_t* indices = w.indices + n * w.index_bytes();
            const int64_t whole = w.k / 8;
            int64_t bad = -1;
            for (int64_t b = 0; b < whole && bad < 0; ++b) {
              if (kPackTables.mask_of_index[indices[b]] != 0) continue;
              bad = 2 * b + ((indices[b] & 3) < (indices[b] >> 2 & 3) ? 1 : 0);
            }
            const T* values = static_cast<const T*>(w.values) + n * 2 * w.groups();
            for (int64_t g = 2 * whole; g < 2 * w.index_bytes() && bad < 0; ++g) {
              const int nibble = indices[g / 2] >> (4 * (g % 2)) & 15;
              if (g >= w.groups()) {
                if (nibble != 0) bad = g;
                continue;
              }
              if ((nibble & 3) >= nibble >> 2) bad = g;
              for (int slot = 0; slot < 2; ++slot) {
                const int64_t column = 4 * g + (nibble >> (2 * slot) & 3);
                if (column >= w.k && !is_zero(values[2 * g + slot])) bad = g;
              }
            }
            if (bad >= 0)
              return lower_first(n * w.groups() + (bad < w.groups() ? bad : w.groups() - 1));
          }
        });
  });
  const int64_t position = first.load();
  if (position == w.n * w.groups()) return;
  const int64_t row = position / w.groups(), group = position % w.groups();
  fail_indices(w, position, w.indices[row * w.index_bytes() + group / 2]);
}

// A row of the portable format is, per record, one index word and value_words() value words; the
// panel holds those of 16 rows side by side.
void to_panels(const Weight& w, int64_t begin, int64_t end, uint32_t* panels) {
  const int64_t value_bytes = w.value_columns() * size_of(w.dtype), words = w.value_words();
  const PackRows* wide = words % 8 == 0 ? wide_rows() : nullptr;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t record = 0; record < w.records(); ++record, panels += w.record_words()) {
      const int64_t index_at = 4 * record, value_at = 4 * words * record;
      const int64_t index_left = w.index_bytes() - index_at, value_left = value_bytes - value_at;
      const bool whole = (block + 1) * kBlockN <= w.n && index_left >= 4 && value_left >= 4 * words;
      if (wide != nullptr && whole) {
        const int64_t row = block * kBlockN;
        for (int lane = 0; lane < kBlockN; ++lane)
          std::memcpy(panels + lane, w.indices + (row + lane) * w.index_bytes() + index_at, 4);
        wide->side_by_side(static_cast<const char*>(w.values) + row * value_bytes + value_at,
                           value_bytes, words, panels + kBlockN);
        continue;
      }
      std::memset(panels, 0, sizeof(uint32_t) * w.record_words());
      for (int lane = 0; lane < kBlockN && block * kBlockN + lane < w.n; ++lane) {
        const int64_t row = block * kBlockN + lane;
        std::memcpy(panels + lane, w.indices + row * w.index_bytes() + index_at,
                    index_left < 4 ? index_left : 4);
        uint32_t kept[2 * kRecordGroups] = {};
        std::memcpy(kept, static_cast<const char*>(w.values) + row * value_bytes + value_at,
                    value_left < 4 * words ? value_left : 4 * words);
        for (int64_t word = 0; word < words; ++word)
          panels[(1 + word) * kBlockN + lane] = kept[word];
      }
    }
  }
}

void from_panels(const Weight& w, int64_t begin, int64_t end, void* values, uint8_t* indices) {
  const int64_t value_bytes = w.value_columns() * size_of(w.dtype), words = w.value_words();
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t record = 0; record < w.records(); ++record) {
      const uint32_t* panels = w.panels + block * w.block_words() + record * w.record_words();
      const int64_t index_at = 4 * record, value_at = 4 * words * record;
      const int64_t index_left = w.index_bytes() - index_at, value_left = value_bytes - value_at;
      for (int lane = 0; lane < kBlockN && block * kBlockN + lane < w.n; ++lane) {
        const int64_t row = block * kBlockN + lane;
        std::memcpy(indices + row * w.index_bytes() + index_at, panels + lane,
                    index_left < 4 ? index_left : 4);
        uint32_t kept[2 * kRecordGroups];
        for (int64_t word = 0; word < words; ++word)
          kept[word] = panels[(1 + word) * kBlockN + lane];
        std::memcpy(static_cast<char*>(values) + row * value_bytes + value_at, kept,
                    value_left < 4 * words ? value_left : 4 * words);
      }
    }
  }
}

}  // namespace gossamer::sparse24
