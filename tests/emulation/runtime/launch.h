#pragma once
// A launch: the clusters of a grid one after another, each as fibers.
#include <functional>

#include "runtime/cluster.h"

namespace gossamer::emulation {

// `cluster` blocks in a row along x are one.
void run_grid(int cluster, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& kernel, const Site& site);

}  // namespace gossamer::emulation
