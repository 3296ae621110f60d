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

constexpr int kMaxMapRank = 5;

// Asks the driver's function `name` for a map. Its arguments for the box, which are in the middle,
// depend on the kind of map.
template <class Function, class... Box>
TensorMap encode_map(const char* name, const void* global, int element_bytes, int rank,
                     const int64_t* extents, const int64_t* strides, Swizzle swizzle,
                     const Box&... box) {
  static const Function encode = [name] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    GOSSAMER_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string("this driver has no ") + name);
    }
    return reinterpret_cast<Function>(entry);
  }();
  cuuint64_t sizes[kMaxMapRank], pitches[kMaxMapRank];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(extents[i]);
    if (i + 1 < rank) pitches[i] = static_cast<cuuint64_t>(strides[i]);
  }
  // Only the size of an element matters: outside the tensor, zeros are zeros in every type.
  const CUtensorMapDataType type = element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  constexpr CUtensorMapSwizzle kModes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  TensorMap map;
  const auto encode_it = [&] {
    return encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(global), sizes,
                  pitches, box..., CU_TENSOR_MAP_INTERLEAVE_NONE, kModes[static_cast<int>(swizzle)],
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode_it();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    // To the driver, unlike the runtime, a thread that begins its CUDA work here has no device.
    int device = 0;
    GOSSAMER_CUDA_CHECK(cudaGetDevice(&device));
    GOSSAMER_CUDA_CHECK(cudaSetDevice(device));
    status = encode_it();
  }
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": error " + std::to_string(status) +
                             " for a tensor of rank " + std::to_string(rank) + " with " +
                             std::to_string(extents[0]) + " x " +
                             std::to_string(rank > 1 ? extents[1] : 1) + " elements of " +
                             std::to_string(element_bytes) + " bytes");
  }
  return map;
}

// `rank` dimensions of `extents` elements, the contiguous one first; `strides[i]` is the distance
// in bytes between neighbours in dimension i + 1, a multiple of 16 and at least what dimension i
// spans: CUDA promises nothing for rows that overlap. A tile has `box` elements, at
// most 256 in each dimension, and its rows of box[0] elements at most the swizzle's span.
inline TensorMap tensor_map(const void* global, int element_bytes, int rank, const int64_t* extents,
                            const int64_t* strides, const int* box, Swizzle swizzle) {
  cuuint32_t tile[kMaxMapRank], steps[kMaxMapRank];
  for (int i = 0; i < rank; ++i) {
    tile[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  return encode_map<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", global,
                                                       element_bytes, rank, extents, strides,
                                                       swizzle, tile, steps);
}

// Images whose pixels lie channels last, for loads in im2col mode (ptx::tma_load_im2col): `extents`
// are C, W, H and N, `strides` those of W, H and N as above. A tile has `pixels` rows, at most
// 1024, of `channels` elements, at most 256, a multiple of 16 bytes and at most the swizzle's span.
//
// Its rows belong to base pixels, where the first tap of a convolution's kernel lies. They fill a
// box of each image: along an axis of n pixels, W and then H, from `lower` to n - 1 + `upper`, both
// included, in steps of `steps`. Of a convolution that has `out` outputs there, lower = -padding,
// steps = stride, and upper = (out - 1) * stride - padding - (n - 1), or as much more as is less
// than a step.
inline TensorMap im2col_map(const void* global, int element_bytes, const int64_t* extents,
                            const int64_t* strides, const int* lower, const int* upper,
                            const int* steps, int channels, int pixels, Swizzle swizzle) {
  const cuuint32_t all_steps[] = {1, static_cast<cuuint32_t>(steps[0]),
                                  static_cast<cuuint32_t>(steps[1]), 1};
  return encode_map<PFN_cuTensorMapEncodeIm2col_v12000>(
      "cuTensorMapEncodeIm2col", global, element_bytes, 4, extents, strides, swizzle, lower, upper,
      static_cast<cuuint32_t>(channels), static_cast<cuuint32_t>(pixels), all_steps);
}

}  // namespace gossamer
