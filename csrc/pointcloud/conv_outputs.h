#pragma once
// What every kernel does around its products: tiles of outputs whose sums lie in scratch, of each
// tap the slice of pairs that belongs to the tile, and the finished rows. Included by units of one
// instruction set.
#include "common/simd_finish.h"
#include "pointcloud/conv_unit.h"

namespace gossamer::pointcloud {
namespace {

// The pairs of a tap that add to a tile of outputs.
struct Slice {
  int64_t tap, begin, end;
  int64_t first;  // rank of the tile's first output
};

// From pair `begin` on. A tap has no output twice, so its slice is no longer than the tile.
Slice slice_of(const KernelMap& map, int64_t tap, int64_t begin, int64_t first, int64_t last) {
  int64_t low = begin, high = map.tap_offsets[tap + 1];
  if (high - low > last - first) high = low + (last - first);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (map.out[middle] < last) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return {tap, begin, low, first};
}

// The rows that pairs gather, from a channel on. By value: vector stores may alias anything, and
// the map would be read again after each.
template <class T>
struct Rows {
  const T *x, *end;  // of the memory
  int64_t stride;
  const int32_t *in, *order;

  Rows(const ConvArgs& args, int64_t channel)
      : x(static_cast<const T*>(args.x) + channel),
        end(static_cast<const T*>(args.x) + (args.map.n_in - 1) * args.x_stride + args.channels.in),
        stride(args.x_stride),
        in(args.map.in),
        order(args.map.in_order) {}

  const T* of(int64_t pair) const {
    const int64_t rank = in[pair];
    return x + (order == nullptr ? rank : order[rank]) * stride;
  }
  void fetch(int64_t pair, int64_t channels) const {
    const T* row = of(pair);
    for (int64_t c = 0; c < channels; c += 64 / int64_t{sizeof(T)}) __builtin_prefetch(row + c);
  }
};

template <class S, class T>
struct Outputs {
  using F = typename S::F;

  static int64_t whole(int64_t channels) { return (channels + S::kLanes - 1) / S::kLanes; }
  static SumsRow sums_row(const Channels& channels) {
    const int64_t group = whole(channels.group_out()) * S::kLanes;
    return {group, group * channels.groups};
  }

  template <class Multiply>
  static void run(const ConvTask& task, const SumsRow& row, const Multiply& multiply) {
    const KernelMap& map = task.args.map;
    for (int64_t first = task.begin; first < task.end; first += task.tile) {
      const int64_t last = first + task.tile < task.end ? first + task.tile : task.end;
      __builtin_memset(task.sums, 0, (last - first) * row.all * sizeof(float));
      for (int64_t tap = 0; tap < map.taps; ++tap) {
        const Slice slice = slice_of(map, tap, task.next[tap], first, last);
        if (slice.end > slice.begin) multiply(slice);
        task.next[tap] = slice.end;
      }
      finish(task, row, first, last);
    }
  }

  static void finish(const ConvTask& task, const SumsRow& row, int64_t first, int64_t last) {
    const ConvArgs& args = task.args;
    const int64_t groups = row.all / row.group, outputs = args.channels.out / groups;
    const Activation activation = args.activation;
    const float* const bias = task.bias;
    const int32_t* const order = args.map.out_order;
    T* const first_row = static_cast<T*>(args.y);
    const float* sums = task.sums;
    for (int64_t rank = first; rank < last; ++rank, sums += row.all) {
      T* y = first_row + (order == nullptr ? rank : order[rank]) * groups * outputs;
      for (int64_t g = 0; g < groups; ++g, y += outputs) {
        for (int64_t o = 0; o < outputs; o += S::kLanes) {
          const int64_t at = g * row.group + o;
          const F sum = S::add(S::load(sums + at), S::load(bias + at));
          const F result = Finish<S, T>::activate(sum, activation);
          if (outputs - o >= S::kLanes) {
            S::store(y + o, result);
          } else {
            T part[S::kLanes];
            S::store(part, result);
            for (int64_t i = 0; i < outputs - o; ++i) y[o + i] = part[i];
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace gossamer::pointcloud
