#pragma once
// The fused activations on a GPU.
#include "common/ptx.cuh"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

__device__ __forceinline__ float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::kNone: return y;
    case Activation::kReLU: return y < 0.0f ? 0.0f : y;  // NaN stays
    case Activation::kGELU: return 0.5f * y * erfcf(-0.70710678f * y);
    // Within 2 units in the last place, and zero where the result is below 2e-36. The exact
    // division branches, once for each of the hundred sums that a thread of a large tile has.
    case Activation::kSiLU: return __fdividef(y, 1.0f + expf(-y));
  }
  return y;
}

}  // namespace gossamer::sparse24
