#include "runtime/launch.h"

#include <mutex>
#include <numeric>
#include <utility>

namespace gossamer::emulation {

void run_grid(int cluster, dim3 grid, dim3 size, size_t shared_bytes,
              const std::function<void()>& kernel, const Site& site) {
  // What Hopper offers a block, and a little for the guards between tiles, which no GPU has.
  constexpr size_t kMaxSharedBytes = (227 + 16) << 10;
  static std::mutex one_at_a_time;  // `block` and `running` are the process's
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const size_t threads = size_t{size.x} * size.y * size.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || size.z > 64) {
    fault(site, "launch: a block of ", size.x, " x ", size.y, " x ", size.z, " threads");
  }
  if (blocks < 1 || grid.y > 65535 || grid.z > 65535) {
    fault(site, "launch: a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks");
  }
  if (shared_bytes > kMaxSharedBytes) {
    fault(site, "launch: ", shared_bytes, " bytes of shared memory");
  }

  if (cluster < 1 || cluster > Cluster::kMaxBlocks || grid.x % cluster != 0) {
    fault(site, "launch: a cluster of ", cluster, " blocks in a grid of ", grid.x, " x ", grid.y,
          " x ", grid.z);
  }

  Cluster now(cluster, grid, size, shared_bytes, kernel);
  std::vector<size_t> order(blocks / cluster);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = order.size() - 1; schedule.seed != 0 && i > 0; --i) {
    std::swap(order[i], order[now.random.below(static_cast<uint32_t>(i + 1))]);
  }
  for (const size_t which : order) {
    const size_t i = which * cluster;  // its first block
    now.run({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
             static_cast<unsigned>(i / (size_t{grid.x} * grid.y))});
  }
}

}  // namespace gossamer::emulation

// For Python: the schedule of the launches to come.
extern "C" __attribute__((visibility("default"))) void set_schedule(int64_t early, uint64_t seed) {
  gossamer::emulation::schedule = {early != 0, seed};
}
