#pragma once
// The index nibbles of eight groups in a word, idx0 | idx1 << 2 from bit 4g on: legal is
// idx0 < idx1.
#include "common/ptx.cuh"

namespace gossamer::sparse24::cuda {

// Bit 4g + 2 for every group g whose nibble is not legal.
__device__ __forceinline__ uint32_t illegal_nibbles(uint32_t word) {
  const uint32_t first = word & 0x33333333u, second = word >> 2 & 0x33333333u;
  // Nibble by nibble second + 4 - first - 1, which is 0 to 6: no borrow, and at least 4 if legal.
  return ~((second | 0x44444444u) - first - 0x11111111u) & 0x44444444u;
}

// The same word with 0, 1 in place of what is not legal, which is that bit alone.
__device__ __forceinline__ uint32_t legal_nibbles(uint32_t word) {
  const uint32_t illegal = illegal_nibbles(word);
  return (word & ~((illegal >> 2) * 15u)) | illegal;
}

}  // namespace gossamer::sparse24::cuda
