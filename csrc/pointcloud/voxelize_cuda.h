#pragma once
// The launchers of a GPU's voxels. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void quantize_cuda(const Points& points, int32_t* cells, int64_t* refused, cudaStream_t stream);
void keys_of_cells(const CudaCellKeys& args, cudaStream_t stream);
void inspect_order(const CudaOrder& args, cudaStream_t stream);
void write_voxels(const CudaVoxels& args, cudaStream_t stream);

}  // namespace gossamer::pointcloud
