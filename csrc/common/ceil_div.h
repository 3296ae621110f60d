#pragma once
#include <cstdint>

namespace gossamer {

// `static`: units compiled for different instruction sets each keep their own copy.
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gossamer
