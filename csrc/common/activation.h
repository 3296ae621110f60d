#pragma once
// What a product may apply to its sums before they are stored.
#include <cstdint>

namespace gossamer {

enum class Activation : uint8_t { kNone, kReLU, kGELU, kSiLU };

}  // namespace gossamer
