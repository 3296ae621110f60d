#pragma once
// The 2:4 kernels, written once over a vector vocabulary S (common/simd_*.h), the storage type T of
// x, W and y, and a Multiply that says how a kept weight meets x:
//
//   MultiplyAdd  float32 multiply-add, T converted on the way in (multiply_add.h)
//   DotBF16      a kept pair at a time, by VDPBF16PS (gemm_avx512_bf16.cpp)
//
// Per Multiply:  X            element of a packed few_rows x
//                kSteps       broadcast weights a record holds per output (many_rows)
//                kPanelRows   packed rows of x a record of many_rows reads
#include "sparse24/gemm_few_rows.h"
#include "sparse24/gemm_many_rows.h"
#include "sparse24/multiply_add.h"

namespace gossamer::sparse24 {

template <class S, class T, class Multiply>
struct Kernels {
  using Few = FewRows<S, T, Multiply>;
  using Many = ManyRows<S, T, Multiply>;
  static constexpr Unit unit = {
      sizeof(typename Multiply::X), Multiply::kPanelRows, 0, Few::pack, Few::run, Many::run};
};

// The unit of float32 multiply-adds; null for a dtype without kernels.
template <class S>
const Unit* multiply_add_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &Kernels<S, float, MultiplyAdd<S, float>>::unit;
    case DType::kBFloat16: return &Kernels<S, BFloat16, MultiplyAdd<S, BFloat16>>::unit;
    case DType::kFloat16: return &Kernels<S, Float16, MultiplyAdd<S, Float16>>::unit;
    default: return nullptr;
  }
}

}  // namespace gossamer::sparse24
