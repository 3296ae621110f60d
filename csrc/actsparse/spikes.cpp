#include "actsparse/spikes.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "common/ceil_div.h"
#include "common/parallel.h"

namespace gossamer::actsparse::spikes {

Set find_set(const uint8_t* bits, int64_t tokens, int64_t features, int threads) {
  const int64_t bytes = ceil_div(features, 8);
  Set set;
  set.begins.assign(tokens + 1, 0);
  threads = threads_for_bytes(threads, tokens * features);
  parallel_ranges(threads, tokens, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t count = 0;
      for (int64_t b = 0; b < bytes; ++b) count += std::popcount(bits[t * bytes + b]);
      set.begins[t + 1] = count;
    }
  });
  for (int64_t t = 0; t < tokens; ++t) set.begins[t + 1] += set.begins[t];
  set.inputs.resize(set.begins[tokens]);
  parallel_ranges(threads, tokens, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t at = set.begins[t];
      for (int64_t b = 0; b < bytes; ++b) {
        for (unsigned byte = bits[t * bytes + b]; byte != 0; byte &= byte - 1) {
          set.inputs[at++] = static_cast<uint32_t>(b * 8 + std::countr_zero(byte));
        }
      }
    }
  });
  return set;
}

// Both zeros of a floating type are 0: what is left of its bits without the sign.
template <class Word>
int64_t pack(const Word* x, int64_t stride, int64_t tokens, int64_t features, Word one,
             uint8_t* bits, int threads) {
  constexpr Word kSign =
      sizeof(Word) == 1 ? 0 : static_cast<Word>(Word{1} << (sizeof(Word) * 8 - 1));
  const int64_t bytes = ceil_div(features, 8), none = tokens * features;
  std::atomic<int64_t> wrong{none};
  parallel_ranges(threads_for_bytes(threads, none * int64_t{sizeof(Word)}), tokens,
                  [&](int64_t first, int64_t last) {
                    for (int64_t t = first; t < last; ++t) {
                      for (int64_t b = 0; b < bytes; ++b) {
                        unsigned byte = 0;
                        for (int64_t k = b * 8; k < std::min(b * 8 + 8, features); ++k) {
                          const Word entry = x[t * stride + k];
                          byte |= static_cast<unsigned>(entry == one) << (k % 8);
                          if (entry != one && entry != 0 && entry != kSign) {
                            int64_t lowest = wrong.load();
                            while (t * features + k < lowest &&
                                   !wrong.compare_exchange_weak(lowest, t * features + k)) {
                            }
                          }
                        }
                        bits[t * bytes + b] = static_cast<uint8_t>(byte);
                      }
                    }
                  });
  return wrong.load() == none ? -1 : wrong.load();
}

template int64_t pack(const uint8_t*, int64_t, int64_t, int64_t, uint8_t, uint8_t*, int);
template int64_t pack(const uint16_t*, int64_t, int64_t, int64_t, uint16_t, uint8_t*, int);
template int64_t pack(const uint32_t*, int64_t, int64_t, int64_t, uint32_t, uint8_t*, int);
template int64_t pack(const uint64_t*, int64_t, int64_t, int64_t, uint64_t, uint8_t*, int);

}  // namespace gossamer::actsparse::spikes
