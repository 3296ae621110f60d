#include "actsparse/kernels.h"
#include "common/simd_avx512.h"

namespace gossamer::actsparse {

const Unit* unit_avx512(DType dtype) { return unit_of_dtype<Simd>(dtype); }

}  // namespace gossamer::actsparse
