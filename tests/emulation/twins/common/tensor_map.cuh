#pragma once
// The host twin of csrc/common/tensor_map.cuh: a tensor map is a plain struct.
#include <cstdint>

#include "common/swizzle.h"
#include "runtime/fault.h"

namespace gossamer {

constexpr int kMaxMapRank = 5;

struct alignas(64) TensorMap {
  unsigned char* global;
  int element_bytes, rank;
  int64_t extents[kMaxMapRank], strides[kMaxMapRank];  // strides in bytes, of every dimension
  int box[kMaxMapRank];  // in im2col mode channels and pixels, and 1 in the last two
  Swizzle swizzle;
  bool im2col;
  int lower[2], upper[2], steps[2];  // of W and H, in im2col mode
};

namespace emulation {

// What both kinds of map have in common. What the driver refuses is refused here, too, and what its
// manual rules out.
inline TensorMap checked_map(const char* name, const void* global, int element_bytes, int rank,
                             const int64_t* extents, const int64_t* strides, const int* box,
                             Swizzle swizzle, const Site& site) {
  const int span = swizzle == Swizzle::kNone ? 0 : 16 << static_cast<int>(swizzle);
  const int row = box[0] * element_bytes;
  if (rank < 1 || rank > kMaxMapRank) fault(site, name, ": a rank of ", rank);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fault(site, name, ": the tensor's address is not a multiple of 16");
  }
  if (row % 16 != 0) fault(site, name, ": rows of ", row, " bytes are not multiples of 16");
  if (span != 0 && row > span) {
    fault(site, name, ": rows of ", row, " bytes, longer than the swizzle's ", span);
  }
  TensorMap map{};
  map.global = static_cast<unsigned char*>(const_cast<void*>(global));
  map.element_bytes = element_bytes;
  map.rank = rank;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    if (extents[i] < 1 || extents[i] > int64_t{1} << 32) {
      fault(site, name, ": dimension ", i, " has ", extents[i], " elements");
    }
    if (i > 0 && strides[i - 1] % 16 != 0) {
      fault(site, name, ": a stride of ", strides[i - 1], " bytes is not a multiple of 16");
    }
    if (i > 0 && strides[i - 1] >= int64_t{1} << 40) {
      fault(site, name, ": a stride of ", strides[i - 1], " bytes does not fit 40 bits");
    }
    const int64_t below = i == 0 ? 0 : extents[i - 1] * (i == 1 ? element_bytes : strides[i - 2]);
    if (i > 0 && extents[i] > 1 && strides[i - 1] < below) {
      fault(site, name, ": a stride of ", strides[i - 1], " bytes, less than the ", below,
            " of dimension ", i - 1);
    }
    map.extents[i] = extents[i];
    map.strides[i] = i == 0 ? element_bytes : strides[i - 1];
    map.box[i] = box[i];
  }
  return map;
}

}  // namespace emulation

inline TensorMap tensor_map(const void* global, int element_bytes, int rank, const int64_t* extents,
                            const int64_t* strides, const int* box, Swizzle swizzle,
                            emulation::Site site = emulation::Site::current()) {
  const TensorMap map = emulation::checked_map("tensor_map", global, element_bytes, rank, extents,
                                               strides, box, swizzle, site);
  for (int i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > 256) {
      emulation::fault(site, "tensor_map: a box of ", box[i], " elements");
    }
  }
  return map;
}

inline TensorMap im2col_map(const void* global, int element_bytes, const int64_t* extents,
                            const int64_t* strides, const int* lower, const int* upper,
                            const int* steps, int channels, int pixels, Swizzle swizzle,
                            emulation::Site site = emulation::Site::current()) {
  using emulation::fault;
  const char* name = "im2col_map";
  const int box[] = {channels, pixels, 1, 1};
  TensorMap map =
      emulation::checked_map(name, global, element_bytes, 4, extents, strides, box, swizzle, site);
  if (channels < 1 || channels > 256) fault(site, name, ": ", channels, " channels a pixel");
  if (pixels < 1 || pixels > 1024) fault(site, name, ": ", pixels, " pixels");
  map.im2col = true;
  for (int i = 0; i < 2; ++i) {
    const auto has_bits = [](int corner) { return corner >= -128 && corner <= 127; };
    if (!has_bits(lower[i]) || !has_bits(upper[i]) || steps[i] < 1 || steps[i] > 8) {
      fault(site, name, ": no bits for corners at ", lower[i], " and ", upper[i], " and a step of ",
            steps[i]);
    }
    if (extents[1 + i] - 1 + upper[i] < lower[i]) {
      fault(site, name, ": corners at ", lower[i], " and ", upper[i], " around ", extents[1 + i],
            " pixels leave an empty box");
    }
    map.lower[i] = lower[i];
    map.upper[i] = upper[i];
    map.steps[i] = steps[i];
  }
  return map;
}

}  // namespace gossamer
