#pragma once
// What the CUDA module hands to _C.
#include "blocksparse/cuda.h"

namespace gossamer::blocksparse {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::blocksparse
