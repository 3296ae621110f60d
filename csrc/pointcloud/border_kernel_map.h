#pragma once
// The checks of a kernel map that Python hands over: it can be made by hand, and a wrong number in
// it must not become an address. Included by api files only.
#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <vector>

#include "common/border.h"
#include "common/parallel.h"
#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

// The tensors of a kernel map, as they come from Python.
struct MapViews {
  const TensorView &in, &out, &tap_offsets;
  const std::optional<TensorView>&in_order, &out_order;
};

// One pass over `count` ranks, of which the sign of `wrong(i)` tells: arithmetic that the compiler
// makes vectors of. Returns the first wrong one's index, or -1; a second pass looks for it.
template <class Wrong>
int64_t first_wrong(int64_t begin, int64_t end, const Wrong& wrong) {
  uint32_t signs = 0;
  for (int64_t i = begin; i < end; ++i) signs |= wrong(i);
  for (int64_t i = begin; signs >> 31 != 0 && i < end; ++i) {
    if (wrong(i) >> 31 != 0) return i;
  }
  return -1;
}

inline void check_ranks(const char* op, const char* what, const TensorView& ranks, int64_t count,
                        int threads) {
  const auto* rank = ranks.as<const uint32_t>();
  const int64_t n = ranks.numel(), most = std::numeric_limits<int32_t>::max();
  const auto last = static_cast<uint32_t>(std::min(count - 1, most));
  std::atomic<int64_t> found{-1};
  parallel_ranges(threads_for_bytes(threads, 4 * n), n, [&](int64_t begin, int64_t end) {
    const int64_t at =
        first_wrong(begin, end, [&](int64_t i) { return rank[i] | (last - rank[i]); });
    if (at >= 0) found.store(at);
  });
  const int64_t at = found.load();
  if (at >= 0) {
    fail(op, ": ", what, "[", at, "] is ", static_cast<int32_t>(rank[at]), ", there are ", count,
         " rows");
  }
}

// How a tap's ranks follow each other: by one at least, or as they may where many inputs meet one
// output.
enum class Ascent : uint8_t { kWeak = 0, kStrict = 1 };

// Pairs of a tap whose ranks do not ascend would be passed over, or be counted for a wrong output.
inline void check_ascending(const char* op, const char* what, const TensorView& ranks,
                            const int64_t* tap_offsets, int64_t taps, Ascent ascent, int threads) {
  const auto* rank = ranks.as<const uint32_t>();
  const auto least = static_cast<uint32_t>(ascent);
  std::atomic<int64_t> found{-1};
  const int64_t n = ranks.numel();
  parallel_ranges(threads_for_bytes(threads, 4 * n), n, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t first = std::max(begin, tap_offsets[t] + 1);
      const int64_t at = first_wrong(first, std::min(end, tap_offsets[t + 1]),
                                     [&](int64_t i) { return rank[i] - rank[i - 1] - least; });
      if (at >= 0) found.store(at);
    }
  });
  const int64_t at = found.load();
  if (at >= 0) {
    fail(op, ": ", what, "[", at, "] is ", rank[at],
         ascent == Ascent::kStrict ? ", not above " : ", below ", rank[at - 1],
         ", the one before it in its tap");
  }
}

inline void check_order(const char* op, const char* what, const std::optional<TensorView>& order,
                        int64_t count, int threads) {
  if (!order) return;
  check_dtype(op, what, *order, DType::kInt32);
  check_vector(op, what, *order, count);
  check_ranks(op, what, *order, count, threads);
}

// A row that no rank has would be left as it was in memory.
inline void check_each_once(const char* op, const char* what, const TensorView& order) {
  const auto* row = order.as<const int32_t>();
  std::vector<bool> met(order.numel());
  for (int64_t i = 0; i < order.numel(); ++i) {
    GOSSAMER_CHECK(!met[row[i]], op, ": ", what, "[", i, "] is ", row[i], ", as one before it");
    met[row[i]] = true;
  }
}

inline KernelMap checked_map(const char* op, const MapViews& views, int64_t taps, int64_t n_in,
                             int64_t n_out, Ascent ascent, int threads) {
  const auto& [in, out, tap_offsets, in_order, out_order] = views;
  check_on_cpu(op, "tap_offsets", tap_offsets);
  check_on_cpu(op, "in_index", in);
  check_on_cpu(op, "out_index", out);
  if (in_order) check_on_cpu(op, "in_order", *in_order);
  if (out_order) check_on_cpu(op, "out_order", *out_order);
  check_dtype(op, "tap_offsets", tap_offsets, DType::kInt64);
  check_vector(op, "tap_offsets", tap_offsets, taps + 1);
  check_dtype(op, "in_index", in, DType::kInt32);
  check_dtype(op, "out_index", out, DType::kInt32);
  const auto* offsets = tap_offsets.as<const int64_t>();
  GOSSAMER_CHECK(offsets[0] == 0, op, ": tap_offsets[0] is ", offsets[0], ", expected 0");
  for (int64_t t = 0; t < taps; ++t) {
    GOSSAMER_CHECK(offsets[t + 1] >= offsets[t], op, ": tap_offsets[", t + 1, "] is ",
                   offsets[t + 1], ", below the one before it, ", offsets[t]);
  }
  check_vector(op, "in_index", in, offsets[taps]);
  check_vector(op, "out_index", out, offsets[taps]);
  check_ranks(op, "in_index", in, n_in, threads);
  check_ranks(op, "out_index", out, n_out, threads);
  check_ascending(op, "in_index", in, offsets, taps, ascent, threads);
  check_ascending(op, "out_index", out, offsets, taps, ascent, threads);
  check_order(op, "in_order", in_order, n_in, threads);
  check_order(op, "out_order", out_order, n_out, threads);
  if (out_order) check_each_once(op, "out_order", *out_order);
  const auto* in_rows = in_order ? in_order->as<const int32_t>() : nullptr;
  const auto* out_rows = out_order ? out_order->as<const int32_t>() : nullptr;
  return {taps,    n_in,    n_out, offsets, in.as<const int32_t>(), out.as<const int32_t>(),
          in_rows, out_rows};
}

}  // namespace gossamer::pointcloud
