#pragma once
// Where a range of outputs begins in each tap, and ranges of outputs of equal work.
#include <algorithm>
#include <cstdint>

#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

// The first pair of a tap at or after an output.
inline int64_t pair_at(const KernelMap& map, int64_t tap, int64_t rank) {
  const int32_t* first = map.out + map.tap_offsets[tap];
  const int32_t* last = map.out + map.tap_offsets[tap + 1];
  return std::lower_bound(first, last, rank) - map.out;
}

// What the outputs before one cost: their pairs, and one more for each to be written.
inline int64_t cost_before(const KernelMap& map, int64_t rank) {
  int64_t cost = rank;
  for (int64_t t = 0; t < map.taps; ++t) cost += pair_at(map, t, rank) - map.tap_offsets[t];
  return cost;
}

// The first output of part number `part` of `parts`, balanced by pairs and not by voxels.
inline int64_t first_rank(const KernelMap& map, int64_t part, int64_t parts) {
  if (part == parts) return map.n_out;
  const int64_t cost = (map.pairs() + map.n_out) / parts * part;
  int64_t low = 0, high = map.n_out;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (cost_before(map, middle) < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace gossamer::pointcloud
