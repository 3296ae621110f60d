#pragma once
// How a tile's 16-byte chunks are permuted in shared memory, so that a column of them lies in
// different banks: address bits 4 and up are xored with bits 7 and up, one, two or three of them.
#include <cstdint>

namespace gossamer {

enum class Swizzle : int { kNone, k32, k64, k128 };  // span in bytes

}  // namespace gossamer
