#pragma once
// What the CUDA module hands to _C.
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

const CudaKernels* cuda_kernel_table();

}  // namespace gossamer::pointcloud
