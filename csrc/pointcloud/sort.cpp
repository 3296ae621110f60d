// The box around a set, and the order of its rows.
#include <algorithm>
#include <limits>

#include "pointcloud/maps.h"
#include "pointcloud/radix_sort.h"

namespace gossamer::pointcloud {
namespace {

struct KeyedRow {
  uint64_t key;
  int32_t row;
};

int bits_of(int64_t count) { return count <= 1 ? 0 : 64 - __builtin_clzll(count - 1); }

// Fills the records with record(key, row); whether the keys ascend strictly as they are.
template <class Record, class Make>
bool fill(Record* records, const int32_t* coords, int64_t count, int columns, const KeySpace& space,
          int threads, const Make& make) {
  const int parts = parts_of(threads, count);
  std::vector<char> ascending(parts);
  for_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
    bool rising = true;
    uint64_t before = begin > 0 ? space.key(coords + (begin - 1) * columns) : 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t key = space.key(coords + i * columns);
      rising &= i == 0 || key > before;
      before = key;
      records[i] = make(key, i);
    }
    ascending[part] = rising;
  });
  return std::all_of(ascending.begin(), ascending.end(), [](char a) { return a != 0; });
}

// Writes the rows of sorted records, and counts those that repeat the one before.
template <class Record, class KeyOf, class RowOf>
SortReport finish(const Record* records, int64_t count, int32_t* order, int threads,
                  const KeyOf& key_of, const RowOf& row_of) {
  const int parts = parts_of(threads, count);
  std::vector<int64_t> repeated(parts), first(parts, std::numeric_limits<int64_t>::max());
  for_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t found = 0, earliest = first[part];
    for (int64_t i = begin; i < end; ++i) {
      order[i] = static_cast<int32_t>(row_of(records[i]));
      if (i > 0 && key_of(records[i]) == key_of(records[i - 1])) {
        ++found;
        earliest = std::min<int64_t>(earliest, order[i]);
      }
    }
    repeated[part] = found;
    first[part] = earliest;
  });
  SortReport report{false, 0, 0};
  for (const int64_t n : repeated) report.repeated += n;
  if (report.repeated) report.first_repeated = *std::min_element(first.begin(), first.end());
  return report;
}

}  // namespace

Box bounds(const int32_t* coords, int64_t count, int columns, int threads) {
  Box box;
  box.columns = columns;
  if (count == 0) return box;
  const int parts = parts_of(threads, count);
  std::vector<Box> boxes(parts);
  for_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
    int32_t low[kMostColumns], high[kMostColumns];
    std::copy_n(coords + begin * columns, columns, low);
    std::copy_n(low, columns, high);
    for (int64_t i = begin; i < end; ++i) {
      for (int c = 0; c < columns; ++c) {
        low[c] = std::min(low[c], coords[i * columns + c]);
        high[c] = std::max(high[c], coords[i * columns + c]);
      }
    }
    std::copy_n(low, columns, boxes[part].low);
    std::copy_n(high, columns, boxes[part].high);
  });
  for (int c = 0; c < columns; ++c) {
    box.low[c] = boxes[0].low[c], box.high[c] = boxes[0].high[c];
    for (const Box& b : boxes) {
      box.low[c] = std::min(box.low[c], b.low[c]);
      box.high[c] = std::max(box.high[c], b.high[c]);
    }
  }
  return box;
}

SortReport sort(const int32_t* coords, int64_t count, const Box& box, int32_t* order, int threads) {
  const KeySpace space(box);
  if (count == 0) return {true, 0, 0};
  const int row_bits = bits_of(count);
  if (space.bits() + row_bits <= 64) {  // key and row in one number: half the memory to move
    const auto key_of = [&](uint64_t r) { return row_bits == 64 ? 0 : r >> row_bits; };
    const auto row_of = [&](uint64_t r) { return r & ((uint64_t{1} << row_bits) - 1); };
    auto records = std::make_unique_for_overwrite<uint64_t[]>(count);
    const bool ascending = fill(
        records.get(), coords, count, box.columns, space, threads,
        [&](uint64_t key, int64_t row) { return key << row_bits | static_cast<uint64_t>(row); });
    if (ascending) return {true, 0, 0};
    radix_sort(records, count, row_bits, space.bits(), threads, [](uint64_t r) { return r; });
    return finish(records.get(), count, order, threads, key_of, row_of);
  }
  auto records = std::make_unique_for_overwrite<KeyedRow[]>(count);
  const bool ascending =
      fill(records.get(), coords, count, box.columns, space, threads,
           [](uint64_t key, int64_t row) { return KeyedRow{key, static_cast<int32_t>(row)}; });
  if (ascending) return {true, 0, 0};
  const auto key_of = [](const KeyedRow& r) { return r.key; };
  radix_sort(records, count, 0, space.bits(), threads, key_of);
  return finish(records.get(), count, order, threads, key_of,
                [](const KeyedRow& r) { return r.row; });
}

}  // namespace gossamer::pointcloud
