#pragma once
// Stages in shared memory that are filled and emptied in turn, each guarded by two mbarriers.
#include <cstdint>

#include "common/launch.cuh"

namespace gossamer {

template <int kSize>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage < kSize) return;
    stage = 0;
    phase ^= 1;
  }
};

}  // namespace gossamer
