#pragma once
// Stable sort of records by some bits of a 64-bit key, least digit first: each part of the records
// counts its digits, and from the counts of all parts it is known where each part's records of each
// digit go. The result does not depend on the parts.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"

namespace gossamer::pointcloud {

// Below this many records a part is not worth a thread.
constexpr int64_t kRecordsPerPart = 1 << 13;
// 512 places to write to at once still have their pages in the TLB.
constexpr int kMostDigitBits = 9;

inline int parts_of(int threads, int64_t count) {
  return static_cast<int>(std::clamp<int64_t>(count / kRecordsPerPart, 1, std::max(threads, 1)));
}

// Calls body(part, begin, end) for `parts` ranges of [0, count), in parallel.
template <class Body>
void for_parts(int parts, int64_t count, const Body& body) {
  parallel_ranges(parts, parts, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      body(part, count * part / parts, count * (part + 1) / parts);
    }
  });
}

// Sorts by the bits [low_bit, low_bit + bits) of key_of(record).
template <class Record, class KeyOf>
void radix_sort(std::unique_ptr<Record[]>& records, int64_t count, int low_bit, int bits,
                int threads, const KeyOf& key_of) {
  if (bits == 0 || count < 2) return;
  const int passes = static_cast<int>(ceil_div(bits, kMostDigitBits));
  const int digit_bits = static_cast<int>(ceil_div(bits, passes));
  const int64_t digits = int64_t{1} << digit_bits;
  const int parts = parts_of(threads, count);
  auto spare = std::make_unique_for_overwrite<Record[]>(count);
  std::vector<int64_t> places(parts * digits);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = low_bit + pass * digit_bits;
    const auto digit_of = [&](const Record& r) {
      return static_cast<int64_t>(key_of(r) >> shift) & (digits - 1);
    };
    std::fill(places.begin(), places.end(), 0);
    for_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
      int64_t* counts = places.data() + part * digits;
      for (int64_t i = begin; i < end; ++i) ++counts[digit_of(records[i])];
    });
    int64_t before = 0;
    for (int64_t digit = 0; digit < digits; ++digit) {
      for (int part = 0; part < parts; ++part) {
        const int64_t n = places[part * digits + digit];
        places[part * digits + digit] = before;
        before += n;
      }
    }
    for_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
      int64_t* place = places.data() + part * digits;
      for (int64_t i = begin; i < end; ++i) spare[place[digit_of(records[i])]++] = records[i];
    });
    records.swap(spare);
  }
}

}  // namespace gossamer::pointcloud
