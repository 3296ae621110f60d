#include "common/simd_avx2.h"
#include "sparse24/project_kernels.h"

namespace gossamer::sparse24 {

const ProjectUnit* project_unit_avx2(DType dtype) { return project_unit<Simd>(dtype); }

}  // namespace gossamer::sparse24
