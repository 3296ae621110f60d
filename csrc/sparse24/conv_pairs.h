#pragma once
// The private layout of a convolution's 2:4 weight, and the border between conv.cpp, which cuts a
// convolution into tiles, and the units that compute one.
//
// A multiply-add that reads its pixels from memory is bound by the loads: two a cycle, and a weight
// besides. So outputs go in pairs, which load the channels that both keep once: of 64 columns each
// keeps 32, and about 16 of them are the other's too. A step of a pair is
//
//   one column that both keep     sum_a += w0 x[k0], sum_b += w1 x[k0]
//   one that only the first does  sum_a += w2 x[k1]
//   one that only the second does sum_b += w3 x[k2]
//
// 4 multiply-adds for 3 loads of pixels. Among the 16 outputs of a block the partners are chosen,
// anew in every pass, so that 16 steps do; where too few columns are shared there are more steps,
// of which some columns are the panel's row of zeros.
//
// A pass is 64 columns of the weight, 16 of its groups of four. Words of 32 bits:
//
//   [passes][blocks][2]                    where the pairs of a block begin, and their steps
//   [pairs, 8 a block][1 + 5 * steps]      the two outputs, 4 bits each, then of each step:
//                                          k0, k1, k2, a byte each, and w0, w1, w2, w3 as float32
//
// Blocks of 16 outputs do not cross groups of the convolution. Where a group's outputs end inside a
// block, the rest repeat others with weights 0. Whatever a byte of a column says leads to the
// panel's memory; where pairs begin and how many steps they have is checked (check_pairs).
#include <cstdint>
#include <vector>

#include "common/ceil_div.h"
#include "common/conv_shape.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

constexpr int kPassColumns = 64, kPassGroups = kPassColumns / 4;
constexpr int kZeroColumn = kPassColumns;  // of a panel
constexpr int kBlockPairs = kBlockN / 2;
constexpr int kMostSteps = kPassColumns / 2;  // of a pair, when it shares no column
constexpr int kPanelColumns = 256;            // that a byte can name
constexpr int64_t pair_words(int64_t steps) { return 1 + 5 * steps; }

// Sizes of a weight as pairs.
struct PairShape {
  int64_t groups, group_out, group_in, taps;
  int64_t tap_groups() const { return ceil_div(group_in, 4); }  // of four columns
  int64_t group_blocks() const { return ceil_div(group_out, kBlockN); }
  int64_t blocks() const { return groups * group_blocks(); }
  int64_t passes() const { return ceil_div(taps * tap_groups(), kPassGroups); }
  int64_t entries() const { return passes() * blocks(); }
  int64_t most_words() const { return entries() * (2 + kBlockPairs * pair_words(kMostSteps)); }
};

inline PairShape pair_shape(const ConvShape& s) {
  return {s.groups, s.group_out(), s.group_in(), s.taps()};
}

// Which group of four columns of the weight's matrix is each group of the passes, or -1. All taps
// of eight channels follow each other: shifted by one pixel they lie in the same lines of x.
std::vector<int64_t> pass_groups(const PairShape& s);

// Portable -> pairs in most_words(), with room behind each block.
void to_pairs(const Weight& weight, const PairShape& s, uint32_t* words, int threads);
// The same without that room; how many words are left.
int64_t close_up(const PairShape& s, uint32_t* words);
// And back, exactly.
void from_pairs(const uint32_t* words, const PairShape& s, const Weight& weight, void* values,
                uint8_t* indices);
// ValueError where pairs lead outside of their words.
void check_pairs(const uint32_t* words, int64_t count, const PairShape& s);

// Stretches of memory.
struct Lines {
  const char* first;
  int64_t count, bytes, stride;
};

// The sums of some blocks of a group over a tile of pixels.
struct PairsTask {
  const uint32_t* words;
  int64_t all_blocks, first_block, blocks, passes;
  const int64_t* columns;  // [passes * 64] of pixel q, x is at x + columns[k]; 0 where it is < 0
  const float* x;          // pixel 0 of the tile
  int tile;                // in registers of pixels
  float* panel;            // scratch: [kPanelColumns][tile * lanes]
  float* sums;             // [blocks * 16][tile * lanes]
  Lines y;                 // what the tile's outputs will be written to
  Lines x_ahead;           // what the thread will pack next
};

// The most registers of pixels of a tile: two sums of each, four weights and x.
constexpr int most_pair_vectors(int64_t lanes) { return lanes == 16 ? 12 : 5; }

void pairs_avx2(const PairsTask& task);
void pairs_avx512(const PairsTask& task);

}  // namespace gossamer::sparse24
