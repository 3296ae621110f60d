#pragma once
// gather: some pairs of a tap at a time, against a panel of the tap's weights.
//
//   x        [pair][word]     gathered rows, a block of channels of them, in L1
//   W        [word][output]   a panel of up to kMostVectors registers of outputs, in L1 or L2
//   sums     [output voxel]   rows of the tile: those of these pairs move to registers and back
//
// Each word of x meets the whole panel, and each register of W all pairs. Written once over a
// vector vocabulary S (common/simd_*.h), the storage type T and Words, which say what a word is:
//
//   kChannels                  in a word
//   gather(x, count, end, to)  count channels of a row, of memory that is readable up to `end`
//   word(w, stride, count)     of a column of weights
//   add(w, x, sum)             sum + w x, lane by lane
//
// depthwise: a lane a channel; pairs follow each other.
#include <type_traits>

#include "pointcloud/conv_outputs.h"

namespace gossamer::pointcloud {
namespace {

// A word is a channel, as float32.
template <class S, class T>
struct FloatWords {
  using F = typename S::F;
  static constexpr int kChannels = 1;
  static void gather(const T* x, int64_t count, const T* end, float* to) {
    for (int64_t c = 0; c < count; c += S::kLanes) {
      if (end - (x + c) >= S::kLanes) {
        S::store(to + c, S::load(x + c));
      } else {
        for (int64_t i = c; i < count; ++i) to[i] = to_float(x[i]);
      }
    }
  }
  static float word(const T* w, int64_t, int64_t) { return to_float(*w); }
  static F add(F w, F x, F sum) { return S::fma(w, x, sum); }
};

template <class S, class T, class Words>
struct Gather {
  using F = typename S::F;
  using Out = Outputs<S, T>;
  static constexpr int kBlock = 64;  // words of a gathered row: with 64 outputs, 16 KB of weights
  static constexpr int kMostVectors = S::kLanes == 16 ? 4 : 2;
  // Sums, a panel's registers and x fit the 32 or 16 registers.
  static constexpr int pairs_of(int vectors) {
    return S::kLanes == 16 ? (vectors == 1 ? 16 : 24 / vectors) : 12 / vectors;
  }
  // Rows whose words are as they lie, few enough for an address each, are not copied.
  static constexpr bool in_place(int vectors) {
    return std::is_same_v<T, float> && pairs_of(vectors) <= 8;
  }
  static constexpr int kAhead = 32;  // pairs, of which the rows are fetched

  static int64_t words_of(int64_t channels) {
    return (channels + Words::kChannels - 1) / Words::kChannels;
  }
  static int64_t panels_of(int64_t vectors) { return (vectors + kMostVectors - 1) / kMostVectors; }

  static int64_t tap_floats(const Channels& channels) {
    return Out::sums_row(channels).all * words_of(channels.group_in());
  }

  // Panels in turn, and in each its outputs word by word.
  static void pack(const ConvArgs& args, int64_t tap, float* packed) {
    const Channels& channels = args.channels;
    const int64_t c_in = channels.group_in(), c_out = channels.group_out();
    const int64_t vectors = Out::whole(c_out), panels = panels_of(vectors);
    const T* weights = static_cast<const T*>(args.weights) + tap * c_in * channels.out;
    for (int64_t g = 0; g < channels.groups; ++g, weights += c_out) {
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = vectors * p / panels * S::kLanes;
        const int64_t last = vectors * (p + 1) / panels * S::kLanes;
        for (int64_t c = 0; c < c_in; c += Words::kChannels) {
          const T* row = weights + c * channels.out;
          for (int64_t o = first; o < last; ++o) {
            *packed++ = o < c_out ? Words::word(row + o, channels.out, c_in - c) : 0.0f;
          }
        }
      }
    }
  }

  template <int Vectors, int Pairs>
  static void multiply(const float* const* x, const float* w, int64_t words, float* const* sums) {
    const float* row[Pairs];
    F sum[Pairs][Vectors];
#pragma GCC unroll 16
    for (int p = 0; p < Pairs; ++p) row[p] = in_place(Vectors) ? x[p] : x[0] + p * kBlock;
#pragma GCC unroll 16
    for (int p = 0; p < Pairs; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[p][v] = S::load(sums[p] + v * S::kLanes);
    }
    for (int64_t i = 0; i < words; ++i, w += Vectors * S::kLanes) {
      F panel[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) panel[v] = S::load(w + v * S::kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < Pairs; ++p) {
        const F word = S::broadcast(row[p] + i);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[p][v] = Words::add(panel[v], word, sum[p][v]);
      }
    }
#pragma GCC unroll 16
    for (int p = 0; p < Pairs; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) S::store(sums[p] + v * S::kLanes, sum[p][v]);
    }
  }
  template <int Vectors, int Pairs>
  static void multiply_up_to(int64_t pairs, const float* const* x, const float* w, int64_t words,
                             float* const* sums) {
    if (pairs == Pairs) return multiply<Vectors, Pairs>(x, w, words, sums);
    if constexpr (Pairs > 1) multiply_up_to<Vectors, Pairs - 1>(pairs, x, w, words, sums);
  }

  // A block of channels of a slice, with its panel.
  struct Part {
    const float* w;
    float* sums;
    int64_t sums_stride;
    int64_t channel, count;
    bool fetch;  // these channels are not read before
  };

  template <int Vectors>
  static void run_part(const ConvTask& task, const Slice& slice, const Part& part) {
    constexpr int kPairs = pairs_of(Vectors);
    const Rows<T> x(task.args, part.channel);
    const int32_t* const out = task.args.map.out;
    const int64_t groups = (slice.end - slice.begin + kPairs - 1) / kPairs;
    const int64_t least = (slice.end - slice.begin) / groups;
    const int64_t longer = (slice.end - slice.begin) % groups;
    const int64_t words = words_of(part.count);
    int64_t pair = slice.begin;
    for (int64_t g = 0; g < groups; ++g) {
      alignas(64) float rows[in_place(Vectors) ? 1 : kPairs * kBlock];
      const float* at[kPairs] = {rows};
      float* sums[kPairs];
      const int64_t pairs = least + (g < longer ? 1 : 0);
      for (int64_t p = 0; p < pairs; ++p) {
        sums[p] = part.sums + (out[pair + p] - slice.first) * part.sums_stride;
      }
      for (int64_t p = kAhead; part.fetch && p < kAhead + pairs && pair + p < slice.end; ++p) {
        x.fetch(pair + p, part.count);
      }
      for (int64_t p = 0; p < pairs; ++p) {
        if constexpr (in_place(Vectors)) {
          at[p] = x.of(pair + p);
        } else {
          Words::gather(x.of(pair + p), part.count, x.end, rows + p * kBlock);
        }
      }
      pair += pairs;
      multiply_up_to<Vectors, kPairs>(pairs, at, part.w, words, sums);
    }
  }
  template <int Vectors>
  static void run_part_of(int64_t vectors, const ConvTask& task, const Slice& slice,
                          const Part& part) {
    if (vectors == Vectors) return run_part<Vectors>(task, slice, part);
    if constexpr (Vectors > 1) run_part_of<Vectors - 1>(vectors, task, slice, part);
  }

  static void run(const ConvTask& task) {
    const Channels& channels = task.args.channels;
    const int64_t c_in = channels.group_in(), floats = tap_floats(channels);
    const int64_t vectors = Out::whole(channels.group_out()), panels = panels_of(vectors);
    const SumsRow row = Out::sums_row(channels);
    Out::run(task, row, [&](const Slice& slice) {
      for (int64_t g = 0; g < channels.groups; ++g) {
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t first = vectors * p / panels, last = vectors * (p + 1) / panels;
          const int64_t width = (last - first) * S::kLanes, at = g * row.group + first * S::kLanes;
          const float* w = task.weights + slice.tap * floats + at * words_of(c_in);
          for (int64_t c = 0; c < c_in; c += kBlock * Words::kChannels) {
            const int64_t rest = c_in - c, block = kBlock * Words::kChannels;
            const Part part = {
                w + c / Words::kChannels * width, task.sums + at, row.all, g * c_in + c,
                rest < block ? rest : block,      p == 0};
            run_part_of<kMostVectors>(last - first, task, slice, part);
          }
        }
      }
    });
  }

  static constexpr ConvUnit unit = {
      .kernel = "gather",
      .why = "rows of a few pairs at a time meet a panel of the tap's weights",
      .sums_row = Out::sums_row,
      .tap_floats = tap_floats,
      .pack = pack,
      .run = run,
  };
};

template <class S, class T>
struct Depthwise {
  using Out = Outputs<S, T>;

  static SumsRow sums_row(const Channels& channels) {
    const int64_t all = Out::whole(channels.out) * S::kLanes;
    return {all, all};
  }
  static int64_t tap_floats(const Channels& channels) { return sums_row(channels).all; }

  static void pack(const ConvArgs& args, int64_t tap, float* packed) {
    const T* weights = static_cast<const T*>(args.weights) + tap * args.channels.out;
    const int64_t padded = tap_floats(args.channels);
    for (int64_t c = 0; c < padded; ++c) {
      packed[c] = c < args.channels.out ? to_float(weights[c]) : 0.0f;
    }
  }

  static void run(const ConvTask& task) {
    const int64_t channels = task.args.channels.out;
    const SumsRow row = sums_row(task.args.channels);
    const Rows<T> x(task.args, 0);
    const int32_t* const out = task.args.map.out;
    Out::run(task, row, [&](const Slice& slice) {
      const float* w = task.weights + slice.tap * row.all;
      for (int64_t pair = slice.begin; pair < slice.end; ++pair) {
        const T* from = x.of(pair);
        float* sums = task.sums + (out[pair] - slice.first) * row.all;
        for (int64_t c = 0; c < channels; c += S::kLanes) {
          float part[S::kLanes];
          FloatWords<S, T>::gather(from + c, channels - c < S::kLanes ? channels - c : S::kLanes,
                                   x.end, part);
          S::store(sums + c, S::fma(S::load(w + c), S::load(part), S::load(sums + c)));
        }
      }
    });
  }

  static constexpr ConvUnit unit = {
      .kernel = "depthwise",
      .why = "a lane a channel",
      .sums_row = sums_row,
      .tap_floats = tap_floats,
      .pack = pack,
      .run = run,
  };
};

template <class S, class T>
const ConvUnit* unit_of(const Channels& channels) {
  return channels.depthwise() ? &Depthwise<S, T>::unit : &Gather<S, T, FloatWords<S, T>>::unit;
}

template <class S>
const ConvUnit* float_unit(DType dtype, const Channels& channels) {
  switch (dtype) {
    case DType::kFloat32: return unit_of<S, float>(channels);
    case DType::kBFloat16: return unit_of<S, BFloat16>(channels);
    case DType::kFloat16: return unit_of<S, Float16>(channels);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::pointcloud
