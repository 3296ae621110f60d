#include <immintrin.h>

#include "probe/probe_loops.h"

namespace gossamer::probe {

float chains_avx2(int64_t steps) {
  // acc <- acc / 2 + 1/2 tends to 1: no overflow, no subnormals, whatever the number of steps.
  const __m256 half = _mm256_set1_ps(0.5f);
  __m256 acc[kChains];
#pragma GCC unroll 12
  for (int chain = 0; chain < kChains; ++chain) {
    acc[chain] = _mm256_set1_ps(static_cast<float>(chain + 2));
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      acc[chain] = _mm256_fmadd_ps(acc[chain], half, half);
    }
  }
#pragma GCC unroll 12
  for (int chain = 1; chain < kChains; ++chain) acc[0] = _mm256_add_ps(acc[0], acc[chain]);
  return _mm256_cvtss_f32(acc[0]);
}

uint64_t read_avx2(const void* data, int64_t lines) {
  const auto* at = static_cast<const __m256i*>(data);
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int64_t line = 0; line < lines; ++line, at += 2) {
    low = _mm256_xor_si256(low, _mm256_load_si256(at));
    high = _mm256_xor_si256(high, _mm256_load_si256(at + 1));
  }
  uint64_t folded[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(folded), _mm256_xor_si256(low, high));
  return folded[0] ^ folded[1] ^ folded[2] ^ folded[3];
}

}  // namespace gossamer::probe
