#include "common/simd_avx2.h"
#include "sparse24/gemm_kernels.h"

namespace gossamer::sparse24 {

template <class T>
static constexpr const Unit* unit_of() {
  return &Kernels<Simd, T, MultiplyAdd<Simd, T>>::unit;
}

const Unit* unit_avx2(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return unit_of<float>();
    case DType::kBFloat16: return unit_of<BFloat16>();
    case DType::kFloat16: return unit_of<Float16>();
    default: return nullptr;
  }
}

}  // namespace gossamer::sparse24
