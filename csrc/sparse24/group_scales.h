#pragma once
// The scales of int4 weights, as the kernels for GPUs read them.
#include <cstdint>

namespace gossamer::sparse24 {

// [n, columns], each for `units` units of columns of a row. inverse: 2^31 / units, rounded down,
// plus 1.
struct GroupScales {
  const float* scales;
  unsigned columns, units, inverse;
};

}  // namespace gossamer::sparse24
