#pragma once
// The host twin of csrc/common/ptx.cuh: the same names and signatures, each instruction by its
// definition. The emulation's include path puts this folder first.
#include "twins/atomics.h"
#include "twins/copies.h"
#include "twins/mma.h"
#include "twins/numbers.h"

namespace gossamer::ptx {

inline float atomic_max(float* address, float value, Site site = Site::current()) {
  const auto larger = [value](float old) { return std::max(old, value); };
  return emulation::atomic("atomic_max", address, larger, site);
}

}  // namespace gossamer::ptx
