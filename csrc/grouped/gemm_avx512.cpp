#include "common/simd_avx512.h"
#include "grouped/gemm_kernels.h"

namespace gossamer::grouped {

const Unit* unit_avx512(DType dtype) { return multiply_add_unit<Simd>(dtype); }

}  // namespace gossamer::grouped
