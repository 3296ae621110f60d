#include "runtime/launch.h"

#include <mutex>
#include <numeric>
#include <utility>

namespace gossamer::emulation {

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel,
              const Site& site) {
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

  SharedMemory shared(shared_bytes);
  Block now(grid, size, shared, kernel);
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = blocks - 1; schedule.seed != 0 && i > 0; --i) {
    std::swap(order[i], order[now.random.below(static_cast<uint32_t>(i + 1))]);
  }
  struct Current {  // also after a fault, the process is outside a launch again
    explicit Current(Block* now) { block = now; }
    ~Current() { block = nullptr; }
  } current(&now);
  for (const size_t i : order) {
    now.run({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
             static_cast<unsigned>(i / (size_t{grid.x} * grid.y))});
  }
}

}  // namespace gossamer::emulation

// For Python: the schedule of the launches to come.
extern "C" __attribute__((visibility("default"))) void set_schedule(int64_t early, uint64_t seed) {
  gossamer::emulation::schedule = {early != 0, seed};
}
