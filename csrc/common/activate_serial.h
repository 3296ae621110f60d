#pragma once
// The fused activations, as the serial kernels apply them. `static`: see common/dtype.h.
#include <cmath>

#include "common/activation.h"

namespace gossamer {

template <class Real>
static inline Real activate(Real z, Activation activation) {
  switch (activation) {
    case Activation::kNone: return z;
    case Activation::kReLU: return z < 0 ? Real(0) : z;  // a NaN stays
    case Activation::kGELU: return z * Real(0.5) * std::erfc(-z * Real(0.70710678118654752440));
    case Activation::kSiLU: return z / (1 + std::exp(-z));
  }
  return z;
}

}  // namespace gossamer
