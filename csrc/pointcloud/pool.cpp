// One kernel for any machine: pooling moves memory, a pair is one addition or comparison.
#include "pointcloud/pool.h"

#include <algorithm>
#include <atomic>

#include "common/ceil_div.h"
#include "common/parallel.h"

namespace gossamer::pointcloud {
namespace {

// A tile's sums in double are 32 KiB, about a first-level cache.
constexpr int64_t kRows = 64, kChannels = 64;

struct Tile {
  int64_t row, rows, channel, channels;
};

// Calls body(tile) for all tiles; which thread takes which is left to their speed.
template <class Body>
void for_tiles(const PoolArgs& args, const Body& body) {
  const KernelMap& map = args.map;
  const int64_t row_tiles = ceil_div(map.n_out, kRows);
  const int64_t tiles = row_tiles * ceil_div(args.channels, kChannels);
  std::atomic<int64_t> next{0};
  const int64_t moved = (map.pairs() + map.n_out) * args.channels;
  const int threads = threads_for_bytes(args.threads, moved * size_of(args.dtype));
  parallel_run(static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(tiles, 1))),
               [&](int, int) {
                 for (int64_t t = next++; t < tiles; t = next++) {
                   const int64_t row = t % row_tiles * kRows, channel = t / row_tiles * kChannels;
                   body(Tile{row, std::min(kRows, map.n_out - row), channel,
                             std::min(kChannels, args.channels - channel)});
                 }
               });
}

// Calls body(row of the input, row within the tile) for the pairs of a tile.
template <class Body>
void for_pairs(const KernelMap& map, const Tile& tile, const Body& body) {
  for (int64_t tap = 0; tap < map.taps; ++tap) {
    const int32_t* begin = map.out + map.tap_offsets[tap];
    const int32_t* end = map.out + map.tap_offsets[tap + 1];
    const int32_t* j = std::lower_bound(begin, end, tile.row);
    const int32_t* i = map.in + (j - map.out);
    for (; j != end && *j < tile.row + tile.rows; ++j, ++i) body(map.in_row(*i), *j - tile.row);
  }
}

// out = the sums of what `term(row of the input, row of the result, its feature)` makes of each.
template <class T, class Term>
void sum_pairs(const PoolArgs& args, bool mean, const Term& term) {
  using Real = decltype(to_float(T{}));
  const auto* feats = static_cast<const T*>(args.feats);
  auto* out = static_cast<T*>(args.out);
  for_tiles(args, [&](const Tile& tile) {
    double sums[kRows][kChannels];
    int64_t counts[kRows] = {};
    for (int64_t at = 0; at < tile.rows; ++at) std::fill_n(sums[at], tile.channels, 0.0);
    for_pairs(args.map, tile, [&](int64_t row, int64_t at) {
      const T* x = feats + row * args.feats_stride + tile.channel;
      ++counts[at];
      term(x, row, at + tile.row, tile, sums[at]);
    });
    for (int64_t at = 0; at < tile.rows; ++at) {
      T* y = out + args.map.out_row(tile.row + at) * args.channels + tile.channel;
      const double share = mean && counts[at] > 0 ? static_cast<double>(counts[at]) : 1.0;
      for (int64_t c = 0; c < tile.channels; ++c) {
        round_to(static_cast<Real>(sums[at][c] / share), y[c]);
      }
    }
  });
}

template <class T>
void sum_features(const PoolArgs& args, bool mean) {
  sum_pairs<T>(args, mean, [](const T* x, int64_t, int64_t, const Tile& tile, double* sums) {
    for (int64_t c = 0; c < tile.channels; ++c) sums[c] += to_float(x[c]);
  });
}

template <class T>
void sum_winners(const PoolArgs& args, const int32_t* winner) {
  sum_pairs<T>(args, false,
               [&](const T* x, int64_t row, int64_t rank, const Tile& tile, double* sums) {
                 const int32_t* took = winner + row * args.channels + tile.channel;
                 const int64_t mine = args.map.out_row(rank);
                 for (int64_t c = 0; c < tile.channels; ++c) {
                   if (took[c] == mine) sums[c] += to_float(x[c]);
                 }
               });
}

template <class T>
void max_features(const PoolArgs& args, int32_t* winner) {
  using Real = decltype(to_float(T{}));
  const auto* feats = static_cast<const T*>(args.feats);
  auto* out = static_cast<T*>(args.out);
  for_tiles(args, [&](const Tile& tile) {
    Real best[kRows][kChannels];
    int32_t took[kRows][kChannels];
    for (int64_t at = 0; at < tile.rows; ++at) std::fill_n(took[at], tile.channels, -1);
    for_pairs(args.map, tile, [&](int64_t row, int64_t at) {
      const T* x = feats + row * args.feats_stride + tile.channel;
      for (int64_t c = 0; c < tile.channels; ++c) {
        const Real value = to_float(x[c]);
        if (took[at][c] < 0 || value > best[at][c] || value != value) {
          best[at][c] = value;
          took[at][c] = static_cast<int32_t>(row);
        }
      }
    });
    for (int64_t at = 0; at < tile.rows; ++at) {
      const int64_t to = args.map.out_row(tile.row + at) * args.channels + tile.channel;
      for (int64_t c = 0; c < tile.channels; ++c) {
        round_to(took[at][c] < 0 ? Real{0} : best[at][c], out[to + c]);
        winner[to + c] = took[at][c];
      }
    }
  });
}

template <class Call>
void for_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64: return call(double{});
    case DType::kFloat32: return call(float{});
    case DType::kBFloat16: return call(BFloat16{});
    case DType::kFloat16: return call(Float16{});
    default: return;  // refused at the border
  }
}

}  // namespace

void sum_pool(const PoolArgs& args, bool mean) {
  for_dtype(args.dtype, [&](auto type) { sum_features<decltype(type)>(args, mean); });
}

void max_pool(const PoolArgs& args, int32_t* winner) {
  for_dtype(args.dtype, [&](auto type) { max_features<decltype(type)>(args, winner); });
}

void max_pool_grad(const PoolArgs& args, const int32_t* winner) {
  for_dtype(args.dtype, [&](auto type) { sum_winners<decltype(type)>(args, winner); });
}

}  // namespace gossamer::pointcloud
