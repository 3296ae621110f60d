#pragma once
// The launchers of a GPU's pooling. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void list_pairs(const CudaListing& listing, cudaStream_t stream);
void pool_cuda(const CudaPoolArgs& args, cudaStream_t stream);

}  // namespace gossamer::pointcloud
