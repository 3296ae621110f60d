#pragma once
// The fused activations on a GPU.
#include "common/activation.h"
#include "common/ptx.cuh"

namespace gossamer {

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

__device__ __forceinline__ double activate(double y, Activation activation) {
  switch (activation) {
    case Activation::kNone: return y;
    case Activation::kReLU: return y < 0.0 ? 0.0 : y;
    case Activation::kGELU: return 0.5 * y * erfc(-0.70710678118654752 * y);
    case Activation::kSiLU: return y / (1.0 + exp(-y));
  }
  return y;
}

}  // namespace gossamer
