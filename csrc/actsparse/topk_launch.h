#pragma once
// The launchers of the k-sparse kernels on a GPU. Each runs on the current device.
#include "actsparse/topk_cuda.h"
#include "common/launch.cuh"

namespace gossamer::actsparse::topk {

void sum_bags_cuda(const CudaBags& args, cudaStream_t stream);
void dot_rows_cuda(const CudaDots& args, cudaStream_t stream);
void select_cuda(const CudaSelection& args, cudaStream_t stream);

}  // namespace gossamer::actsparse::topk
