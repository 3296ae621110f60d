#pragma once
// The product of a 2:4 convolution over a vector vocabulary S (common/simd_*.h): pairs of outputs
// (conv_pairs.h) against a tile of pixels.
//
//   planes of x, in L2     channel c | x[q] | x[q+1] | ...    of a strip (blocksparse/conv_unit.h)
//   panel of x, in L1      column k  | x[q'] | x[q'+1] | ...  the pixels as the column's tap shifts
//                                                             them
//
// A register of shifted pixels lies across two cache lines, which makes two loads of one. So the
// pixels of a tile are copied once for each column, for all outputs to read them aligned.
#include "sparse24/conv_pairs.h"

namespace gossamer::sparse24 {

template <class S>
struct Pairs {
  using F = typename S::F;

  template <int Vectors>
  static void pack(const PairsTask& task, int64_t pass) {
    float* to = task.panel;
    for (int64_t k = pass * kPassColumns; k < (pass + 1) * kPassColumns;
         ++k, to += Vectors * S::kLanes) {
      const float* x = task.x + task.columns[k];
      const bool there = task.columns[k] >= 0;
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        S::store(to + v * S::kLanes, there ? S::load(x + v * S::kLanes) : S::zero());
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) S::store(to + v * S::kLanes, S::zero());
  }

  template <int Vectors>
  static void multiply(const uint32_t* step, int64_t steps, const float* panel, bool first_pass,
                       float* sums_a, float* sums_b) {
    F a[Vectors], b[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      a[v] = first_pass ? S::zero() : S::load(sums_a + v * S::kLanes);
      b[v] = first_pass ? S::zero() : S::load(sums_b + v * S::kLanes);
    }
    for (; steps > 0; --steps, step += 5) {
      const auto column = [&](int which) {
        return S::opaque(panel + (*step >> (8 * which) & 255) * (Vectors * S::kLanes));
      };
      const float *both = column(0), *only_a = column(1), *only_b = column(2);
      const F w0 = S::broadcast(step + 1), w1 = S::broadcast(step + 2);
      const F w2 = S::broadcast(step + 3), w3 = S::broadcast(step + 4);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        const F x = S::loaded(S::load(both + v * S::kLanes));
        a[v] = S::fma(w0, x, a[v]);
        b[v] = S::fma(w1, x, b[v]);
      }
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) {
        a[v] = S::fma(w2, S::load(only_a + v * S::kLanes), a[v]);
        b[v] = S::fma(w3, S::load(only_b + v * S::kLanes), b[v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      S::store(sums_a + v * S::kLanes, a[v]);
      S::store(sums_b + v * S::kLanes, b[v]);
    }
  }

  // One of so many parts.
  static void fetch(const Lines& lines, int64_t part, int64_t parts) {
    const int64_t end = lines.count * (part + 1) / parts;
    for (int64_t i = lines.count * part / parts; i < end; ++i) {
      for (int64_t at = 0; at < lines.bytes; at += 64) {
        __builtin_prefetch(lines.first + i * lines.stride + at, 0, 2);
      }
    }
  }

  template <int Vectors>
  static void run_up_to(const PairsTask& task) {
    if (task.tile != Vectors) {
      if constexpr (Vectors > 1) run_up_to<Vectors - 1>(task);
      return;
    }
    constexpr int64_t kPixels = Vectors * S::kLanes;
    for (int64_t pass = 0; pass < task.passes; ++pass) {
      pack<Vectors>(task, pass);
      for (int64_t block = 0; block < task.blocks; ++block) {
        const uint32_t* entry =
            task.words + 2 * (pass * task.all_blocks + task.first_block + block);
        const uint32_t* pair = task.words + entry[0];
        const int64_t steps = entry[1];
        fetch(task.x_ahead, pass * task.blocks + block, task.passes * task.blocks);
        // Stores that miss wait in the core's buffer, and a load whose address ends in the same 12
        // bits waits with them: of a tile that is written to whole pages every load does.
        if (pass + 1 == task.passes) fetch(task.y, block, task.blocks);
        float* sums = task.sums + block * kBlockN * kPixels;
        for (int i = 0; i < kBlockPairs; ++i, pair += pair_words(steps)) {
          multiply<Vectors>(pair + 1, steps, task.panel, pass == 0, sums + (*pair & 15) * kPixels,
                            sums + (*pair >> 4 & 15) * kPixels);
        }
      }
    }
  }

  static void run(const PairsTask& task) { run_up_to<most_pair_vectors(S::kLanes)>(task); }
};

}  // namespace gossamer::sparse24
