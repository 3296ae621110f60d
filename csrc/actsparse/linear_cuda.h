#pragma once
// The launchers of the products on a GPU. Each runs on the current device.
#include "actsparse/cuda.h"
#include "common/launch.cuh"

namespace gossamer::actsparse {

void linear_cuda(const CudaLinearArgs& args, cudaStream_t stream);
void outputs_cuda(const CudaOutputsArgs& args, cudaStream_t stream);

}  // namespace gossamer::actsparse
