#include <immintrin.h>

#include "probe/probe_loops.h"

namespace gossamer::probe {

float chains_avx512_bf16(int64_t steps) {
  // Every lane adds 1 * 1 + 1 * -1 to its sum, which therefore never grows. In bfloat16 1 is
  // 0x3f80 and -1 is 0xbf80.
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  const auto signs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(0xbf803f80u)));
  __m512 acc[kChainsAVX512];
#pragma GCC unroll 24
  for (int chain = 0; chain < kChainsAVX512; ++chain) {
    acc[chain] = _mm512_set1_ps(static_cast<float>(chain + 2));
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int chain = 0; chain < kChainsAVX512; ++chain) {
      acc[chain] = _mm512_dpbf16_ps(acc[chain], ones, signs);
    }
  }
#pragma GCC unroll 24
  for (int chain = 1; chain < kChainsAVX512; ++chain) acc[0] = _mm512_add_ps(acc[0], acc[chain]);
  return _mm512_cvtss_f32(acc[0]);
}

}  // namespace gossamer::probe
