#include "blocksparse/dvalues_kernels.h"
#include "common/simd_avx2.h"

namespace gossamer::blocksparse {

const DvaluesUnit* dvalues_unit_avx2(DType dtype) { return dvalues_unit<Simd>(dtype); }

}  // namespace gossamer::blocksparse
