#pragma once
// The launchers of a GPU's layouts of a map. Each runs on the current device.
#include "common/launch.cuh"
#include "pointcloud/cuda.h"

namespace gossamer::pointcloud {

void mask_taps(const CudaPairs& pairs, void* masks, bool wide, cudaStream_t stream);
void group_outputs(const CudaPairs& pairs, const CudaGroups& groups, cudaStream_t stream);
void fill_table(const CudaPairs& pairs, const CudaGroups& groups, const CudaTable& table,
                cudaStream_t stream);
void rows_of_pairs(const CudaPairs& pairs, int32_t* in_rows, int32_t* out_rows,
                   cudaStream_t stream);

}  // namespace gossamer::pointcloud
