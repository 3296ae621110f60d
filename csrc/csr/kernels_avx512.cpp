#include "common/simd_avx512.h"
#include "csr/kernels.h"

namespace gossamer::csr {

const Unit* unit_avx512(DType dtype) { return unit_of_dtype<Simd>(dtype); }

}  // namespace gossamer::csr
