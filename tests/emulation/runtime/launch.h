#pragma once
// A launch: the blocks of a grid one after another, each as fibers.
#include <functional>

#include "runtime/block.h"

namespace gossamer::emulation {

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
              const Site& site);

}  // namespace gossamer::emulation
