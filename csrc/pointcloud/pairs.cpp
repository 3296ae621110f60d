// The search for pairs: one merge of walkers and targets a line of taps along the last axis.
#include <algorithm>

#include "common/ceil_div.h"
#include "common/scratch.h"
#include "pointcloud/maps.h"
#include "pointcloud/radix_sort.h"

namespace gossamer::pointcloud {
namespace {

// Walkers searched at once: for the 13 taps of half a 3x3x3 kernel 100 KB of pairs.
constexpr int64_t kChunk = 1024;

thread_local Scratch found;

// The taps that differ along the last axis only.
struct Line {
  uint64_t shift;  // of its first tap's key from the walker's
  int64_t first_tap, taps;
};

// Where a walker's window begins, if it can hold a target.
struct Origins {
  Box possible;
  Window window;
  KeySpace space;

  Origins(const Box& targets, const Window& w)
      : possible(targets), window(w), space(with_reach(targets, w)) {
    for (int a = 0; a + 1 < targets.columns; ++a) {
      possible.low[a + 1] -= (w.kernel[a] - 1) * w.dilation[a];
    }
  }
  uint64_t of(const int32_t* walker) const {
    int64_t first[kMostColumns] = {walker[0]};
    for (int c = 1; c < possible.columns; ++c) {
      first[c] = walker[c] * window.stride[c - 1] - window.padding[c - 1];
    }
    return possible.holds(first) ? space.key(first) : kNoKey;
  }
};

std::vector<Line> lines_of(const KeySpace& space, const Window& window, int axes,
                           int64_t searched) {
  const int64_t length = window.kernel[axes - 1];
  std::vector<Line> lines;
  for (int64_t tap = 0; tap < searched; tap += length) {
    uint64_t shift = 0;
    int64_t rest = tap / length;
    for (int a = axes - 2; a >= 0; --a) {
      shift +=
          static_cast<uint64_t>(rest % window.kernel[a] * window.dilation[a]) * space.step(a + 1);
      rest /= window.kernel[a];
    }
    lines.push_back({shift, tap, std::min(length, searched - tap)});
  }
  return lines;
}

// The pairs of one line of `kTaps` neighbouring taps, or of `taps` where kTaps is 0, for the
// walkers [begin, end). targets ends with kNoKey. walkers_out and targets_out hold kChunk a tap.
template <int kTaps>
void search(const uint64_t* origins, int64_t begin, int64_t end, uint64_t shift, int64_t taps,
            uint64_t dilation, const uint64_t* targets, int64_t target_count, int32_t* walkers_out,
            int32_t* targets_out, int32_t* counts) {
  const int64_t length = kTaps ? kTaps : taps;
  int32_t count[kTaps ? kTaps : 1] = {};
  const uint64_t* at = nullptr;
  for (int64_t walker = begin; walker < end; ++walker) {
    if (origins[walker] == kNoKey) continue;
    uint64_t wanted = origins[walker] + shift;
    if (at == nullptr) at = std::lower_bound(targets, targets + target_count, wanted);
    while (*at < wanted) ++at;
    const uint64_t* next = at;
    for (int64_t tap = 0; tap < length; ++tap, wanted += dilation) {
      if (kTaps) {  // written in any case, and kept where it counts: no branch to mispredict
        const int32_t hit = *next == wanted;
        walkers_out[tap * kChunk + count[tap]] = static_cast<int32_t>(walker);
        targets_out[tap * kChunk + count[tap]] = static_cast<int32_t>(next - targets);
        count[tap] += hit;
        next += hit;
      } else {
        while (*next < wanted) ++next;
        if (*next != wanted) continue;
        walkers_out[tap * kChunk + counts[tap]] = static_cast<int32_t>(walker);
        targets_out[tap * kChunk + counts[tap]++] = static_cast<int32_t>(next - targets);
      }
    }
  }
  for (int tap = 0; tap < kTaps; ++tap) counts[tap] = count[tap];
}

// By number of neighbouring taps: those that kernels of size 1, 2, 3 and 5 have.
decltype(&search<0>) search_of(int64_t taps, int64_t dilation) {
  if (dilation > 1 && taps > 1) return &search<0>;
  switch (taps) {
    case 1: return &search<1>;
    case 2: return &search<2>;
    case 3: return &search<3>;
    case 5: return &search<5>;
    default: return &search<0>;
  }
}

}  // namespace

Pairs::Pairs(const Rows& walkers, const Rows& targets, const Box& target_box, const Window& window,
             bool mirrored, int threads)
    : taps_(1), count_(walkers.count) {
  const int axes = targets.columns - 1;
  for (int a = 0; a < axes; ++a) taps_ *= window.kernel[a];
  searched_ = mirrored ? taps_ / 2 : taps_;
  tap_offsets_.assign(taps_ + 1, 0);
  if (count_ == 0 || targets.count == 0) {
    count_ = 0;
    return;
  }
  const Origins origin(target_box, window);
  auto target_keys = std::make_unique_for_overwrite<uint64_t[]>(targets.count + 1);
  target_keys[targets.count] = kNoKey;
  for_parts(parts_of(threads, targets.count), targets.count,
            [&](int64_t, int64_t begin, int64_t end) {
              for (int64_t r = begin; r < end; ++r) {
                target_keys[r] = origin.space.key(targets.at_rank(r));
              }
            });
  const std::vector<Line> lines = lines_of(origin.space, window, axes, searched_);
  chunks_.resize(ceil_div(count_, kChunk));
  const auto last_dilation = static_cast<uint64_t>(window.dilation[axes - 1]);
  parallel_ranges(
      parts_of(threads, count_), static_cast<int64_t>(chunks_.size()),
      [&](int64_t first, int64_t last) {
        uint64_t origins[kChunk];
        auto* const walkers_out = static_cast<int32_t*>(found.at_least(searched_ * kChunk * 8));
        int32_t* const targets_out = walkers_out + searched_ * kChunk;
        for (int64_t c = first; c < last; ++c) {
          const int64_t begin = c * kChunk, rows = std::min(kChunk, count_ - begin);
          for (int64_t i = 0; i < rows; ++i) origins[i] = origin.of(walkers.at_rank(begin + i));
          Chunk& chunk = chunks_[c];
          chunk.counts.assign(searched_, 0);
          chunk.places.resize(searched_);
          for (const Line& line : lines) {
            search_of(line.taps, window.dilation[axes - 1])(
                origins, 0, rows, line.shift, line.taps, last_dilation, target_keys.get(),
                targets.count, walkers_out + line.first_tap * kChunk,
                targets_out + line.first_tap * kChunk, chunk.counts.data() + line.first_tap);
          }
          int64_t pairs = 0;
          for (const int32_t n : chunk.counts) pairs += n;
          chunk.ranks = std::make_unique_for_overwrite<int32_t[]>(2 * pairs);
          int32_t* to = chunk.ranks.get();
          for (int64_t tap = 0; tap < searched_; ++tap) {
            const int32_t n = chunk.counts[tap];
            const int32_t* walker = walkers_out + tap * kChunk;
            for (int32_t i = 0; i < n; ++i) to[i] = walker[i] + static_cast<int32_t>(begin);
            std::copy_n(targets_out + tap * kChunk, n, to + n);
            to += 2 * n;
          }
        }
      });
  std::vector<int64_t> totals(taps_, 0);
  for (Chunk& chunk : chunks_) {
    for (int64_t tap = 0; tap < searched_; ++tap) {
      chunk.places[tap] = totals[tap];  // within the tap
      totals[tap] += chunk.counts[tap];
    }
  }
  if (mirrored) {
    totals[searched_] = count_;
    for (int64_t tap = 0; tap < searched_; ++tap) totals[taps_ - 1 - tap] = totals[tap];
  }
  for (int64_t tap = 0; tap < taps_; ++tap) tap_offsets_[tap + 1] = tap_offsets_[tap] + totals[tap];
}

void Pairs::write(int32_t* walker_ranks, int32_t* target_ranks, int threads) const {
  if (count_ == 0) return;
  const bool mirrored = searched_ < taps_;
  parallel_ranges(parts_of(threads, count_), static_cast<int64_t>(chunks_.size()),
                  [&](int64_t first, int64_t last) {
                    for (int64_t c = first; c < last; ++c) {
                      const Chunk& chunk = chunks_[c];
                      const int32_t* from = chunk.ranks.get();
                      for (int64_t tap = 0; tap < searched_; ++tap) {
                        const int64_t n = chunk.counts[tap], place = chunk.places[tap];
                        std::copy_n(from, n, walker_ranks + tap_offsets_[tap] + place);
                        std::copy_n(from + n, n, target_ranks + tap_offsets_[tap] + place);
                        if (mirrored) {
                          const int64_t mirror = tap_offsets_[taps_ - 1 - tap] + place;
                          std::copy_n(from + n, n, walker_ranks + mirror);
                          std::copy_n(from, n, target_ranks + mirror);
                        }
                        from += 2 * n;
                      }
                      if (mirrored) {
                        const int64_t begin = c * kChunk, end = std::min(begin + kChunk, count_);
                        for (int64_t r = begin; r < end; ++r) {
                          walker_ranks[tap_offsets_[searched_] + r] = static_cast<int32_t>(r);
                          target_ranks[tap_offsets_[searched_] + r] = static_cast<int32_t>(r);
                        }
                      }
                    }
                  });
}

}  // namespace gossamer::pointcloud
