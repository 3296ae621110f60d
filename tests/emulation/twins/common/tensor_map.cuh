#pragma once
// The host twin of csrc/common/tensor_map.cuh: a tensor map is a plain struct.
#include <cstdint>

#include "common/swizzle.h"
#include "runtime/fault.h"

namespace gossamer {

struct alignas(64) TensorMap {
  static constexpr int kMaxRank = 5;
  unsigned char* global;
  int element_bytes, rank;
  int64_t extents[kMaxRank], strides[kMaxRank];  // strides in bytes, of every dimension
  int box[kMaxRank];
  Swizzle swizzle;
};

// What the driver refuses is refused here, too, and what its manual rules out.
inline TensorMap tensor_map(const void* global, int element_bytes, int rank, const int64_t* extents,
                            const int64_t* strides, const int* box, Swizzle swizzle,
                            emulation::Site site = emulation::Site::current()) {
  using emulation::fault;
  const int span = swizzle == Swizzle::kNone ? 0 : 16 << static_cast<int>(swizzle);
  const int row = box[0] * element_bytes;
  if (rank < 1 || rank > TensorMap::kMaxRank) fault(site, "tensor_map: a rank of ", rank);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fault(site, "tensor_map: the tensor's address is not a multiple of 16");
  }
  if (row % 16 != 0) fault(site, "tensor_map: rows of ", row, " bytes are not multiples of 16");
  if (span != 0 && row > span) {
    fault(site, "tensor_map: rows of ", row, " bytes, longer than the swizzle's ", span);
  }
  TensorMap map{};
  map.global = static_cast<unsigned char*>(const_cast<void*>(global));
  map.element_bytes = element_bytes;
  map.rank = rank;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    if (extents[i] < 1 || extents[i] > int64_t{1} << 32) {
      fault(site, "tensor_map: dimension ", i, " has ", extents[i], " elements");
    }
    if (box[i] < 1 || box[i] > 256) fault(site, "tensor_map: a box of ", box[i], " elements");
    if (i > 0 && strides[i - 1] % 16 != 0) {
      fault(site, "tensor_map: a stride of ", strides[i - 1], " bytes is not a multiple of 16");
    }
    const int64_t below = i == 0 ? 0 : extents[i - 1] * (i == 1 ? element_bytes : strides[i - 2]);
    if (i > 0 && extents[i] > 1 && strides[i - 1] < below) {
      fault(site, "tensor_map: a stride of ", strides[i - 1], " bytes, less than the ", below,
            " of dimension ", i - 1);
    }
    map.extents[i] = extents[i];
    map.strides[i] = i == 0 ? element_bytes : strides[i - 1];
    map.box[i] = box[i];
  }
  return map;
}

}  // namespace gossamer
