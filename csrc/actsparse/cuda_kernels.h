#pragma once
// What the CUDA module hands to _C.
#include "actsparse/cuda.h"

namespace gossamer::actsparse {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::actsparse
