#pragma once
// The tiles of outputs that a part of the weights' gradient goes over, and in each its taps.
#include "pointcloud/conv_outputs.h"

namespace gossamer::pointcloud {
namespace {

template <class RunSlice>
void run_slices(const WeightGradTask& task, const SumsRow& row, const RunSlice& run_slice) {
  const KernelMap& map = task.args.map;
  const int64_t each = task.args.channels.group_in() * row.all;
  __builtin_memset(task.sums, 0, (task.last_tap - task.first_tap) * each * sizeof(float));
  for (int64_t first = task.begin; first < task.end; first += task.tile) {
    const int64_t last = first + task.tile < task.end ? first + task.tile : task.end;
    for (int64_t tap = task.first_tap; tap < task.last_tap; ++tap) {
      const Slice slice = slice_of(map, tap, task.next[tap], first, last);
      if (slice.end > slice.begin) {
        run_slice(task.args, slice, task.sums + (tap - task.first_tap) * each);
      }
      task.next[tap] = slice.end;
    }
  }
}

}  // namespace
}  // namespace gossamer::pointcloud
