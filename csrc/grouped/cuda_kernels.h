#pragma once
// What the CUDA module hands to _C.
#include "grouped/cuda.h"

namespace gossamer::grouped {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::grouped
