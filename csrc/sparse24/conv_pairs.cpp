// Conversions between the portable 2:4 weight of a convolution and pairs of outputs.
#include "sparse24/conv_pairs.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"

namespace gossamer::sparse24 {
namespace {

// Of 16 outputs in one pass: which of its columns each keeps, and the weights there.
struct Block {
  uint64_t kept[kBlockN] = {};
  float weights[kBlockN][kPassColumns];
};

template <class T>
void read_block(const Weight& w, const PairShape& s, const int64_t* groups, int64_t block,
                Block& to) {
  const int64_t in_group = block % s.group_blocks() * kBlockN;
  const int64_t first = block / s.group_blocks() * s.group_out + in_group;
  const int64_t outputs = std::min<int64_t>(kBlockN, s.group_out - in_group);
  for (int64_t o = 0; o < outputs; ++o) {
    const uint8_t* indices = w.indices + (first + o) * w.index_bytes();
    const T* values = static_cast<const T*>(w.values) + (first + o) * w.value_columns();
    for (int g = 0; g < kPassGroups; ++g) {
      const int64_t group = groups[g];
      if (group < 0) continue;
      const int nibble = indices[group / 2] >> (4 * (group % 2)) & 15;
      for (int slot = 0; slot < 2; ++slot) {
        const int column = 4 * g + (nibble >> (2 * slot) & 3);
        to.kept[o] |= uint64_t{1} << column;
        to.weights[o][column] = to_float(values[2 * group + slot]);
      }
    }
  }
  for (int64_t o = outputs; o < kBlockN; ++o) {
    to.kept[o] = to.kept[o % outputs];
    std::fill(std::begin(to.weights[o]), std::end(to.weights[o]), 0.0f);
  }
}

// Steps that two outputs need: one has room for a column of both and one of each.
int steps_of(int kept_a, int kept_b, int both) {
  const int most = std::max(kept_a, kept_b);
  return std::max((most + 1) / 2, most - both);
}

// Partners, from neighbours on: as long as the pair of most steps can swap with another one for
// fewer of both, it does. The most steps of a pair.
int find_partners(const uint64_t (&kept)[kBlockN], int (&order)[kBlockN]) {
  int counts[kBlockN], table[kBlockN][kBlockN];
  for (int a = 0; a < kBlockN; ++a) {
    order[a] = a, counts[a] = std::popcount(kept[a]);
    for (int b = 0; b <= a; ++b) {
      table[a][b] = table[b][a] = steps_of(counts[a], counts[b], std::popcount(kept[a] & kept[b]));
    }
  }
  const auto steps = [&](int i, int j) { return table[order[i]][order[j]]; };
  while (true) {
    int worst = 0, most = 0;
    for (int pair = 0; pair < kBlockN; pair += 2) {
      if (steps(pair, pair + 1) > most) worst = pair, most = steps(pair, pair + 1);
    }
    int best = -1, least = most;
    for (int other = 0; other < kBlockN; ++other) {
      if (other / 2 == worst / 2) continue;
      // Swapping `other` with the second of the pair.
      const int both = std::max(steps(worst, other), steps(worst + 1, other ^ 1));
      if (both < least) least = both, best = other;
    }
    if (best < 0) return most;
    std::swap(order[worst + 1], order[best]);
  }
}

int take(uint64_t& columns) {
  if (columns == 0) return kZeroColumn;
  const int column = std::countr_zero(columns);
  columns &= columns - 1;
  return column;
}

void write_pair(const Block& block, int first, int second, int steps, uint32_t* to) {
  uint64_t both = block.kept[first] & block.kept[second];
  uint64_t a = block.kept[first] & ~both, b = block.kept[second] & ~both;
  for (int shared = std::popcount(both); shared > steps; --shared) {
    const uint64_t column = both & -both;
    both ^= column, a |= column, b |= column;
  }
  const auto weight = [&](int output, int column) {
    return std::bit_cast<uint32_t>(column == kZeroColumn ? 0.0f : block.weights[output][column]);
  };
  *to++ = static_cast<uint32_t>(first | second << 4);
  for (; steps > 0; --steps, to += 5) {
    const int k0 = take(both), k1 = take(a), k2 = take(b);
    to[0] = static_cast<uint32_t>(k0 | k1 << 8 | k2 << 16);
    to[1] = weight(first, k0), to[2] = weight(second, k0);
    to[3] = weight(first, k1), to[4] = weight(second, k2);
  }
}

}  // namespace

std::vector<int64_t> pass_groups(const PairShape& s) {
  constexpr int64_t kNear = 2;
  std::vector<int64_t> groups;
  for (int64_t first = 0; first < s.tap_groups(); first += kNear) {
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      for (int64_t g = first; g < std::min(first + kNear, s.tap_groups()); ++g) {
        groups.push_back(tap * s.tap_groups() + g);
      }
    }
  }
  groups.resize(s.passes() * kPassGroups, -1);
  return groups;
}

void to_pairs(const Weight& w, const PairShape& s, uint32_t* words, int threads) {
  const std::vector<int64_t> groups = pass_groups(s);
  const int64_t entries = s.entries(), most = kBlockPairs * pair_words(kMostSteps);
  const int team = threads_for_bytes(threads, 4 * entries * most);
  parallel_ranges(team, entries, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Block block;
      const int64_t* of_pass = groups.data() + i / s.blocks() * kPassGroups;
      switch (w.dtype) {
        case DType::kBFloat16: read_block<BFloat16>(w, s, of_pass, i % s.blocks(), block); break;
        case DType::kFloat16: read_block<Float16>(w, s, of_pass, i % s.blocks(), block); break;
        default: read_block<float>(w, s, of_pass, i % s.blocks(), block);
      }
      int order[kBlockN];
      const int steps = find_partners(block.kept, order);
      uint32_t* to = words + 2 * entries + i * most;
      words[2 * i] = static_cast<uint32_t>(to - words);
      words[2 * i + 1] = static_cast<uint32_t>(steps);
      for (int pair = 0; pair < kBlockN; pair += 2, to += pair_words(steps)) {
        write_pair(block, order[pair], order[pair + 1], steps, to);
      }
    }
  });
}

int64_t close_up(const PairShape& s, uint32_t* words) {
  int64_t count = 2 * s.entries();
  for (int64_t i = 0; i < s.entries(); ++i) {
    const int64_t length = kBlockPairs * pair_words(words[2 * i + 1]);
    std::memmove(words + count, words + words[2 * i], 4 * length);
    words[2 * i] = static_cast<uint32_t>(count);
    count += length;
  }
  return count;
}

void from_pairs(const uint32_t* words, const PairShape& s, const Weight& w, void* values,
                uint8_t* indices) {
  const std::vector<int64_t> groups = pass_groups(s);
  const int64_t size = size_of(w.dtype);
  std::memset(indices, 0, w.n * w.index_bytes());
  std::memset(values, 0, w.n * w.value_columns() * size);
  for (int64_t i = 0; i < s.entries(); ++i) {
    const int64_t block = i % s.blocks(), in_group = block % s.group_blocks() * kBlockN;
    const int64_t first = block / s.group_blocks() * s.group_out + in_group;
    const int64_t outputs = std::min<int64_t>(kBlockN, s.group_out - in_group);
    const uint32_t* pair = words + words[2 * i];
    const int64_t steps = words[2 * i + 1];
    Block read;
    for (int p = 0; p < kBlockPairs; ++p, pair += pair_words(steps)) {
      const auto keep = [&](int64_t output, uint32_t column, uint32_t weight) {
        if (column >= kPassColumns) return;
        read.kept[output] |= uint64_t{1} << column;
        read.weights[output][column] = std::bit_cast<float>(weight);
      };
      const int64_t a = *pair & 15, b = *pair >> 4 & 15;
      for (int64_t step = 0; step < steps; ++step) {
        const uint32_t* at = pair + pair_words(step);
        keep(a, *at & 255, at[1]), keep(b, *at & 255, at[2]);
        keep(a, *at >> 8 & 255, at[3]), keep(b, *at >> 16 & 255, at[4]);
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t row = first + o;
      for (int g = 0; g < kPassGroups; ++g) {
        const int64_t group = groups[i / s.blocks() * kPassGroups + g];
        uint64_t left = read.kept[o] >> (4 * g) & 15;
        for (int slot = 0; slot < 2 && left != 0 && group >= 0; ++slot) {
          const int column = take(left);
          indices[row * w.index_bytes() + group / 2] |=
              static_cast<uint8_t>(column << (4 * (group % 2) + 2 * slot));
          char* to =
              static_cast<char*>(values) + (row * w.value_columns() + 2 * group + slot) * size;
          const float weight = read.weights[o][4 * g + column];
          switch (w.dtype) {
            case DType::kBFloat16: round_to(weight, *reinterpret_cast<BFloat16*>(to)); break;
            case DType::kFloat16: round_to(weight, *reinterpret_cast<Float16*>(to)); break;
            default: std::memcpy(to, &weight, 4);
          }
        }
      }
    }
  }
}

void check_pairs(const uint32_t* words, int64_t count, const PairShape& s) {
  const int64_t entries = s.entries();
  GOSSAMER_CHECK(count >= 2 * entries, "Sparse24ConvPanels: ", count, " words for ", entries,
                 " blocks");
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t begin = words[2 * i], steps = words[2 * i + 1];
    GOSSAMER_CHECK(steps <= kMostSteps && begin + kBlockPairs * pair_words(steps) <= count,
                   "Sparse24ConvPanels: ", steps, " steps from word ", begin, " on, of ", count);
  }
}

}  // namespace gossamer::sparse24
