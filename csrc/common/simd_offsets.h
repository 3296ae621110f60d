#pragma once
// Addresses: sixteen 16-bit lanes of offsets, and a base for constant ones. What the vocabularies
// of simd_avx2.h and simd_avx512.h share. In the unnamed namespace, as they are.
#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

struct SimdOffsets {
  // A base in one register, whose constant offsets stay in the instructions that read there. Of the
  // weights, gcc otherwise adds each of them up outside the loop and, having no register left for
  // the sums, spills them. Of x, it leaves base and index apart, and Intel splits a multiply-add
  // that has both: 4 to 12 % of the whole loop on Emerald Rapids.
  template <class T>
  static const T* opaque(const T* p) {
    asm("" : "+r"(p));
    return p;
  }

  // A vector in a register, which gcc otherwise loads again for every operation that can read it
  // from memory.
  template <class V>
  static V loaded(V a) {
#ifndef GOSSAMER_EMULATES_X86  // whose vectors take two registers
    asm("" : "+v"(a));
#endif
    return a;
  }

  using H = __m256i;
  static H add16(H a, H b) { return _mm256_add_epi16(a, b); }
  static H mul16(H a, H b) { return _mm256_mullo_epi16(a, b); }
  static H set16(int64_t x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static H group_columns() {  // of two kept values a group of four columns
    return _mm256_setr_epi16(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  }

  // Four of them at a time move to an integer register.
  static uint64_t quad(H a, int which) {
    switch (which) {
      case 0: return static_cast<uint64_t>(_mm256_extract_epi64(a, 0));
      case 1: return static_cast<uint64_t>(_mm256_extract_epi64(a, 1));
      case 2: return static_cast<uint64_t>(_mm256_extract_epi64(a, 2));
      default: return static_cast<uint64_t>(_mm256_extract_epi64(a, 3));
    }
  }
};

}  // namespace
}  // namespace gossamer
