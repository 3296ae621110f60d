#include <immintrin.h>

#include "probe/probe_loops.h"

namespace gossamer::probe {

float chains_avx512(int64_t steps) {
  // acc <- acc / 2 + 1/2 tends to 1: no overflow, no subnormals, whatever the number of steps.
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 acc[kChainsAVX512];
#pragma GCC unroll 24
  for (int chain = 0; chain < kChainsAVX512; ++chain) {
    acc[chain] = _mm512_set1_ps(static_cast<float>(chain + 2));
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int chain = 0; chain < kChainsAVX512; ++chain) {
      acc[chain] = _mm512_fmadd_ps(acc[chain], half, half);
    }
  }
#pragma GCC unroll 24
  for (int chain = 1; chain < kChainsAVX512; ++chain) acc[0] = _mm512_add_ps(acc[0], acc[chain]);
  return _mm512_cvtss_f32(acc[0]);
}

uint64_t read_avx512(const void* data, int64_t lines) {
  const auto* at = static_cast<const __m512i*>(data);
  __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int64_t pair = 0; pair < lines / 2; ++pair, at += 2) {
    even = _mm512_xor_si512(even, _mm512_load_si512(at));
    odd = _mm512_xor_si512(odd, _mm512_load_si512(at + 1));
  }
  if (lines % 2 != 0) even = _mm512_xor_si512(even, _mm512_load_si512(at));
  uint64_t folded[8];
  _mm512_storeu_si512(folded, _mm512_xor_si512(even, odd));
  uint64_t checksum = 0;
  for (const uint64_t word : folded) checksum ^= word;
  return checksum;
}

}  // namespace gossamer::probe
