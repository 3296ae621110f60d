#pragma once
// The description of a tensor that TMA copies tiles of, encoded by the driver. Its entry point is
// asked for at run time, so that nothing links libcuda and the module loads without a driver.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "common/swizzle.h"

namespace gossamer {

// Passed to a kernel as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

// `rank` dimensions of `extents` elements, the contiguous one first; `strides[i]` is the distance
// in bytes between neighbours in dimension i + 1, a multiple of 16 and at least what dimension i
// spans: CUDA promises nothing for rows that overlap. A tile has `box` elements, at
// most 256 in each dimension, and its rows of box[0] elements at most the swizzle's span.
inline TensorMap tensor_map(const void* global, int element_bytes, int rank, const int64_t* extents,
                            const int64_t* strides, const int* box, Swizzle swizzle) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    GOSSAMER_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                         cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  constexpr int kMaxRank = 5;
  cuuint64_t sizes[kMaxRank], pitches[kMaxRank];
  cuuint32_t tile[kMaxRank], steps[kMaxRank];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(extents[i]);
    tile[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i + 1 < rank) pitches[i] = static_cast<cuuint64_t>(strides[i]);
  }
  // Only the size of an element matters: outside the tensor, zeros are zeros in every type.
  const CUtensorMapDataType type = element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  constexpr CUtensorMapSwizzle kModes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  TensorMap map;
  const auto encode_map = [&] {
    return encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(global), sizes,
                  pitches, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  kModes[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode_map();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    // To the driver, unlike the runtime, a thread that begins its CUDA work here has no device.
    int device = 0;
    GOSSAMER_CUDA_CHECK(cudaGetDevice(&device));
    GOSSAMER_CUDA_CHECK(cudaSetDevice(device));
    status = encode_map();
  }
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status) +
                             " for a tensor of rank " + std::to_string(rank) + " with " +
                             std::to_string(extents[0]) + " x " +
                             std::to_string(rank > 1 ? extents[1] : 1) + " elements of " +
                             std::to_string(element_bytes) + " bytes");
  }
  return map;
}

}  // namespace gossamer
