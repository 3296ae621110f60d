// What is done to indices alone.
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "csr/csr.h"

namespace gossamer::csr {
namespace {

template <class Index>
void validate_columns(const char* op, const Pattern& pattern) {
  const auto* col = static_cast<const Index*>(pattern.col);
  for (int64_t i = 0; i < pattern.n; ++i) {
    const int64_t begin = pattern.crow[i], end = pattern.crow[i + 1];
    bool wrong = false;  // without a branch to a place, for the compiler's vectors
    for (int64_t j = begin; j + 1 < end; ++j) wrong |= col[j] >= col[j + 1];
    if (begin < end) wrong |= col[begin] < 0 || col[end - 1] >= pattern.k;
    if (!wrong) continue;
    for (int64_t j = begin; j < end; ++j) {
      GOSSAMER_CHECK(col[j] >= 0 && col[j] < pattern.k, op, ": col_indices[", j, "] is ", col[j],
                     ", outside of the weight's ", pattern.k, " columns");
      GOSSAMER_CHECK(j == begin || col[j - 1] < col[j], op, ": col_indices[", j, "] is ", col[j],
                     " after ", col[j - 1], " in row ", i, ", they must increase");
    }
  }
}

template <class From, class To>
void transpose_places(const Pattern& pattern, int32_t* crow, To* col, int32_t* source) {
  const auto* from = static_cast<const From*>(pattern.col);
  std::vector<int32_t> next(pattern.k + 1, 0);
  for (int64_t j = 0; j < pattern.nnz(); ++j) ++next[from[j] + 1];
  for (int64_t c = 0; c < pattern.k; ++c) next[c + 1] += next[c];
  for (int64_t c = 0; c <= pattern.k; ++c) crow[c] = next[c];
  for (int64_t i = 0; i < pattern.n; ++i) {
    for (int32_t j = pattern.crow[i]; j < pattern.crow[i + 1]; ++j) {
      const int32_t to = next[from[j]]++;
      col[to] = static_cast<To>(i);
      source[to] = j;
    }
  }
}

// Each word of the bytes by an odd number of its own, modulo 2^64.
uint64_t weigh(const void* data, int64_t bytes, uint64_t sum) {
  const auto* from = static_cast<const char*>(data);
  const auto add = [&](int64_t at, int64_t count) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    uint64_t word = 0;
    std::memcpy(&word, from + at, count);
    sum += (word ^ (word >> 32)) * (kOdd + 2 * static_cast<uint64_t>(at));
  };
  const int64_t whole = bytes / 8 * 8;
  for (int64_t at = 0; at < whole; at += 8) add(at, 8);
  if (whole < bytes) add(whole, bytes - whole);
  return sum;
}

}  // namespace

void validate_rows(const char* op, const Pattern& pattern, int64_t count) {
  const int32_t* crow = pattern.crow;
  GOSSAMER_CHECK(crow[0] == 0, op, ": crow_indices[0] is ", crow[0], ", expected 0");
  bool wrong = false;  // without a branch to a place, for the compiler's vectors
  for (int64_t i = 0; i < pattern.n; ++i) wrong |= crow[i] > crow[i + 1];
  for (int64_t i = 0; wrong && i < pattern.n; ++i) {
    GOSSAMER_CHECK(crow[i] <= crow[i + 1], op, ": crow_indices[", i + 1, "] is ", crow[i + 1],
                   ", below the one before it, ", crow[i]);
  }
  GOSSAMER_CHECK(crow[pattern.n] == count, op, ": the last of crow_indices is ", crow[pattern.n],
                 ", there are ", count, " values");
}

void validate(const char* op, const Pattern& pattern, int64_t count) {
  validate_rows(op, pattern, count);
  pattern.wide ? validate_columns<int32_t>(op, pattern) : validate_columns<int16_t>(op, pattern);
}

uint64_t fingerprint(const Pattern& pattern) {
  const int64_t size = pattern.wide ? sizeof(int32_t) : sizeof(int16_t);
  const uint64_t of_rows = weigh(pattern.crow, (pattern.n + 1) * int64_t{sizeof(int32_t)}, 0);
  return weigh(pattern.col, pattern.nnz() * size, of_rows * 31);
}

void transpose(const Pattern& pattern, int32_t* crow, void* col, bool wide, int32_t* source) {
  const auto to = [&]<class To>(To* columns) {
    pattern.wide ? transpose_places<int32_t>(pattern, crow, columns, source)
                 : transpose_places<int16_t>(pattern, crow, columns, source);
  };
  wide ? to(static_cast<int32_t*>(col)) : to(static_cast<int16_t*>(col));
}

void gather(const void* from, const int32_t* source, int64_t count, int64_t size, void* to,
            int threads) {
  const auto run = [&]<class T>(T) {
    parallel_ranges(threads_for_bytes(threads, count * 16), count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        static_cast<T*>(to)[i] = static_cast<const T*>(from)[source[i]];
      }
    });
  };
  size == 2 ? run(uint16_t{}) : size == 4 ? run(uint32_t{}) : run(uint64_t{});
}

}  // namespace gossamer::csr
