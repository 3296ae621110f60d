#pragma once
// What tells modules apart that were not built together.
#include "actsparse/topk_cuda.h"
#include "blocksparse/cuda.h"
#include "common/cuda.h"
#include "grouped/cuda.h"
#include "pointcloud/cuda.h"
#include "sparse24/cuda.h"

namespace gossamer {

// Differs where one of the structs does that cross from one module to the other.
constexpr size_t build_of_cuda() {
  size_t build = 0;
  for (size_t size : {sizeof(CudaModule), sizeof(blocksparse::CudaKernels),
                      sizeof(blocksparse::CudaConvArgs), sizeof(grouped::CudaKernels),
                      sizeof(grouped::CudaGroupedArgs), sizeof(pointcloud::CudaKernels),
                      sizeof(pointcloud::CudaConvArgs), sizeof(pointcloud::CudaWeightGradArgs),
                      sizeof(pointcloud::CudaSearchArgs), sizeof(pointcloud::NumberedRows),
                      sizeof(pointcloud::CudaOutputsArgs), sizeof(pointcloud::CudaCells),
                      sizeof(sparse24::CudaKernels), sizeof(sparse24::CudaGemmArgs),
                      sizeof(actsparse::topk::CudaKernels), sizeof(actsparse::topk::CudaBags),
                      sizeof(actsparse::topk::CudaDots), sizeof(actsparse::topk::CudaSelection)}) {
    build = build * 1000003 + size;
  }
  return build;
}

}  // namespace gossamer
