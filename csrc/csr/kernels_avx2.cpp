#include "common/simd_avx2.h"
#include "csr/kernels.h"

namespace gossamer::csr {

const Unit* unit_avx2(DType dtype) { return unit_of_dtype<Simd>(dtype); }

}  // namespace gossamer::csr
