#include "actsparse/kernels.h"
#include "common/simd_avx2.h"

namespace gossamer::actsparse {

const Unit* unit_avx2(DType dtype) { return unit_of_dtype<Simd>(dtype); }

}  // namespace gossamer::actsparse
