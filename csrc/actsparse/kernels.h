#pragma once
// The kernels of one instruction set.
#include "actsparse/linear_kernels.h"
#include "actsparse/outputs_kernels.h"

namespace gossamer::actsparse {
namespace {

template <class S, class T, class FewUses = Floats<S, T>>
struct Kernels {
  using Linear = LinearKernels<S, T, FewUses>;
  using Outputs = OutputsKernels<S, T>;
  static constexpr Unit unit = {Linear::find_active, Linear::sums_bytes, Linear::linear,
                                Outputs::to_floats, Outputs::outputs};
};

template <class S>
const Unit* unit_of_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Kernels<S, float>::unit;
    case DType::kBFloat16: return &Kernels<S, BFloat16>::unit;
    case DType::kFloat16: return &Kernels<S, Float16>::unit;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace gossamer::actsparse
