#include "blocksparse/conv_kernels.h"
#include "common/simd_avx512.h"

namespace gossamer::blocksparse {

const Unit* unit_avx512(DType dtype) { return conv_unit<Simd>(dtype); }

}  // namespace gossamer::blocksparse
