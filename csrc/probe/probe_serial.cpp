#include "probe/probe_loops.h"

namespace gossamer::probe {
namespace {

// What any compiler turns into four-lane vectors: SSE2 and NEON are part of their baselines.
constexpr int kLanes = 4;

}  // namespace

float chains_serial(int64_t steps) {
  // acc <- acc / 2 + 1/2 tends to 1: no overflow, no subnormals, whatever the number of steps.
  float acc[kChains][kLanes];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int lane = 0; lane < kLanes; ++lane) acc[chain][lane] = static_cast<float>(chain + 2);
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 4
      for (int lane = 0; lane < kLanes; ++lane) acc[chain][lane] = acc[chain][lane] * 0.5f + 0.5f;
    }
  }
  float sum = 0.0f;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int lane = 0; lane < kLanes; ++lane) sum += acc[chain][lane];
  }
  return sum;
}

uint64_t read_serial(const void* data, int64_t lines) {
  constexpr int kWords = 8;  // of 8 bytes in a cache line
  const auto* at = static_cast<const uint64_t*>(data);
  uint64_t folded[kWords] = {};
  for (int64_t line = 0; line < lines; ++line, at += kWords) {
#pragma GCC unroll 8
    for (int word = 0; word < kWords; ++word) folded[word] ^= at[word];
  }
  uint64_t checksum = 0;
  for (int word = 0; word < kWords; ++word) checksum ^= folded[word];
  return checksum;
}

}  // namespace gossamer::probe
