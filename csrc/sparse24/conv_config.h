#pragma once
// How a 2:4 convolution is computed and cut up: pure functions of its shape, the target and the
// threads.
#include "blocksparse/conv_config.h"
#include "sparse24/conv.h"
#include "sparse24/conv_pairs.h"
#include "sparse24/gemm_config.h"

namespace gossamer::sparse24 {

// pairs: tiles of pixels against pairs of outputs (conv_pairs.h).
// dense: torch's convolution with the dense weight, which the caller runs.
enum class ConvKernel : uint8_t { kSerial, kPairs, kDense };

struct ConvChoice {
  ConvKernel kernel;
  const char* why;
};

// The target whose kernels run a convolution.
inline Target conv_target(Target target) { return std::min(target, Target::kAVX512); }

// `packed` weights stay with the kernel that they were packed for.
inline ConvChoice choose_conv_kernel(const ConvShape& s, DType dtype, Target target, bool packed) {
  if (target == Target::kSerial) return {ConvKernel::kSerial, "no vector target is in force"};
  if (dtype == DType::kFloat64) {
    return {ConvKernel::kSerial, "float64 has the serial kernel only"};
  }
  if (packed) return {ConvKernel::kPairs, "the weight is packed"};
  if (dtype == DType::kBFloat16 && target >= Target::kAVX512BF16) {
    return {ConvKernel::kDense,
            "dense bfloat16 products are twice as fast as float32 ones or more"};
  }
  // Cycles for a register of pixels, measured on Emerald Rapids: a multiply-add of the kernel and
  // of a dense convolution, a copy of one column, and packing a channel or finishing an output.
  constexpr double kMultiplyAdd = 0.75, kDense = 0.55, kCopy = 4, kEnds = 10;
  const PairShape pairs = pair_shape(s);
  const int64_t columns = pairs.passes() * kPassColumns * s.groups;
  const int64_t outputs = pairs.group_blocks() * kBlockN;
  const double cycles =
      columns * (outputs / 2 * kMultiplyAdd + kCopy) + kEnds * (s.in_channels + s.groups * outputs);
  const double dense = kDense * s.taps() * s.group_in() * s.out_channels;
  if (cycles > dense) {
    return {ConvKernel::kDense,
            "few channels or outputs: what stands around the arithmetic costs what zeros save"};
  }
  // Making pairs of a weight at every call costs as much as is saved on so many pixels.
  constexpr int64_t kPixels = 4096;
  if (s.batch * s.out_pixels() < kPixels) {
    return {ConvKernel::kDense, "few pixels for a weight that is not packed"};
  }
  return {ConvKernel::kPairs, "bound by arithmetic, of which 2:4 has half"};
}

struct TileConfig {
  int64_t tiles;    // of about one size
  int64_t outputs;  // at a time, so that the sums stay in L2; a multiple of 16
};

// The most registers of pixels of a tile, whose panel takes three quarters of the L1.
inline int64_t most_tile(int64_t lanes, int64_t l1) {
  const int64_t fit = l1 * 3 / 4 / (kPassColumns * 4 * lanes);
  return std::clamp<int64_t>(fit, 1, most_pair_vectors(lanes));
}
// Of a pair in a pass: 16 steps of 4 multiply-adds a register, the sums, and what there is besides.
inline int64_t pass_cycles(int64_t tile) { return 32 * tile + 50; }

// How `vectors` registers of pixels go through the kernel.
inline TileConfig choose_tile(int64_t vectors, int64_t lanes, int64_t l1) {
  const int64_t tiles = ceil_div(vectors, most_tile(lanes, l1)), tile = ceil_div(vectors, tiles);
  const int64_t blocks = kPartialSumBytes / (4 * lanes * tile * kBlockN);
  return {tiles, blocks * kBlockN};
}

// Rows are cut into strips of one tile: while one is multiplied, the x of the thread's next one
// comes into the L2. The threads get as many as it takes for all to end together.
inline blocksparse::ConvConfig choose_pair_strips(const ConvShape& s, int64_t lanes, int64_t l1,
                                                  int64_t l2, int threads) {
  const PairShape pairs = pair_shape(s);
  const int64_t kept = s.out_channels * s.taps() * pairs.tap_groups() * 2;
  blocksparse::ConvConfig config =
      blocksparse::choose_strips(s, kept, pairs.blocks(), 1, lanes, l2, threads);
  if (!blocksparse::is_row(s) || config.parts > 1 || config.strip_images > 1) return config;
  const int64_t vectors = ceil_div(s.out[2], lanes);
  int64_t least = 0;
  for (int64_t tile = 1; tile <= std::min(vectors, most_tile(lanes, l1)); ++tile) {
    const int64_t rounds = ceil_div(s.batch * ceil_div(vectors, tile), config.threads);
    const int64_t cycles = rounds * pass_cycles(tile);
    if (least != 0 && cycles > least) continue;
    least = cycles;
    config.strip_width = tile * lanes;
  }
  return config;
}

}  // namespace gossamer::sparse24
