#include "actsparse/topk_kernels.h"
#include "common/simd_avx512.h"

namespace gossamer::actsparse::topk {

const Unit* unit_avx512(DType dtype) { return unit_of<Simd>(dtype); }

}  // namespace gossamer::actsparse::topk
