#pragma once
// The launchers of a GPU's maps. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void number_rows(const WindowKeys& window, const NumberedRows& rows, bool walkers,
                 cudaStream_t stream);
void search_pairs(const CudaSearchArgs& args, cudaStream_t stream);
void find_outputs(const CudaOutputsArgs& args, cudaStream_t stream);
void cells_of_keys(const CudaCells& args, cudaStream_t stream);

}  // namespace gossamer::pointcloud
