#pragma once
// What the CUDA module hands to _C.
#include "sparse24/cuda.h"

namespace gossamer::sparse24 {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::sparse24
