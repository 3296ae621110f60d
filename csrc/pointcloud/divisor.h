#pragma once
// A division by a number that is known before many are divided, as a multiplication (Granlund and
// Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994): on a GPU some 10
// instructions instead of the 70 of a 64-bit division.
#include <cstdint>

namespace gossamer::pointcloud {

// x / divisor = (x * magic >> 64) >> shift for every x below 2**63; x >> shift where magic is 0.
//
// With 2**shift < divisor < 2**(shift + 1), magic is 2**(64 + shift) / divisor + f, 0 < f <= 1, so
// that the quotient is too large by x * f / 2**(64 + shift) < 2**63 / 2**(64 + shift) < 1 /
// divisor.
struct Divisor {
  uint64_t magic;
  int shift;

  Divisor() = default;
  explicit Divisor(uint64_t divisor) : magic(0), shift(63 - __builtin_clzll(divisor)) {
    if ((divisor & (divisor - 1)) == 0) return;
    magic =
        static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (64 + shift)) / divisor) + 1;
  }
};

}  // namespace gossamer::pointcloud
