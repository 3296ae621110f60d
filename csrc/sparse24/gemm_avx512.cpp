#include "common/simd_avx512.h"
#include "sparse24/gemm_kernels.h"

namespace gossamer::sparse24 {

const Unit* unit_avx512(DType dtype) { return multiply_add_unit<Simd>(dtype); }

}  // namespace gossamer::sparse24
