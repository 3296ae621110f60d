#pragma once
// What the CUDA module hands to _C.
#include "actsparse/topk_cuda.h"

namespace gossamer::actsparse::topk {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::actsparse::topk
