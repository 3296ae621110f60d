#include "runtime/cluster.h"

#include <utility>

namespace gossamer::emulation {
namespace {

// Polls in a row, without anything having changed, that count as a deadlock.
constexpr int kPatience = 200'000;

// In the late schedule, the threads of a warp that run before another warp's turn comes: enough for
// all of its lanes to get to their next meeting while other warps have not begun.
constexpr int kTurns = kWarpSize;

}  // namespace

Cluster::Cluster(int blocks, dim3 grid, dim3 size, size_t shared_bytes,
                 const std::function<void()>& kernel)
    : random(schedule.seed) {
  for (int rank = 0; rank < blocks; ++rank) {
    blocks_.push_back(std::make_unique<Block>(*this, rank, grid, size, shared_bytes, kernel));
    Block& latest = *blocks_.back();
    for (int warp = 0; warp < latest.warp_count(); ++warp) {
      warps_.push_back({&latest, warp * kWarpSize, &latest.ready_of(warp)});
    }
  }
}

void Cluster::run(dim3 first) {
  current_warp_ = -1;
  turns_left_ = polls_ = 0;
  waiting_.clear();
  unfinished_ = size() * blocks_[0]->thread_count;
  for (const auto& each : blocks_) {
    each->begin({first.x + static_cast<unsigned>(each->rank), first.y, first.z});
  }
  struct Current {  // also after a fault, the process is outside a launch again
    ~Current() { block = nullptr; }
  } current;
  block = blocks_[0].get();
  try {
    while (unfinished_ > 0) {
      Thread* next = pick();
      if (next == nullptr && land_one()) continue;
      if (next == nullptr) deadlock("no thread can go on");
      running = next;
      next->fiber.resume();
      running = nullptr;
      block->end_if_finished();
    }
  } catch (...) {
    for (const auto& each : blocks_) each->cancel_unfinished();
    throw;
  }
}

// ---- the scheduler ------------------------------------------------------------------------------

Thread* Cluster::pick() {
  if (polls_ > kPatience && !land_one()) {
    deadlock("threads poll for something that does not come");
  }
  const int warps = static_cast<int>(warps_.size());
  const bool stay = schedule.early || turns_left_-- > 0;
  if (stay && current_warp_ >= 0 && !warps_[current_warp_].ready->empty())
    return pick_from(current_warp_);
  turns_left_ = schedule.seed == 0 ? kTurns : 1 << random.below(12);
  const int first = schedule.seed == 0 ? current_warp_ + 1 : static_cast<int>(random.below(warps));
  for (int i = 0; i < warps; ++i) {
    const int warp = (first + i) % warps;
    if (!warps_[warp].ready->empty()) return pick_from(warp);
  }
  return nullptr;
}

Thread* Cluster::pick_from(int warp) {
  current_warp_ = warp;
  const Warp& from = warps_[warp];
  block = from.block;
  std::vector<int>& lanes = *from.ready;
  const auto count = static_cast<uint32_t>(lanes.size());
  const auto chosen = lanes.begin() + (schedule.seed == 0 ? 0 : random.below(count));
  Thread* thread = block->threads[from.first_thread + *chosen].get();
  lanes.erase(chosen);
  return thread;
}

// Which block's copy comes first is open, too: a multicast arrives at each of its blocks by itself.
bool Cluster::land_one() {
  const bool draw = schedule.seed != 0 && size() > 1;
  const int first = draw ? static_cast<int>(random.below(static_cast<uint32_t>(size()))) : 0;
  for (int i = 0; i < size(); ++i) {
    block = blocks_[(first + i) % size()].get();
    if (block->transactions.land_one()) return true;
  }
  return false;
}

void Cluster::deadlock(const char* reason) {
  block = blocks_[0].get();
  std::string text = where_running() + "deadlock: " + reason + '\n';
  for (const auto& each : blocks_) text += each->report(size() > 1);
  if (!waiting_.empty()) {
    text += "  cluster_sync: " + std::to_string(waiting_.size()) + " of " +
            std::to_string(unfinished_) + " threads are there\n";
  }
  throw Fault(text);
}

// ---- between blocks -----------------------------------------------------------------------------

void Cluster::sync(const Site& site) {
  waiting_.push_back({block, running});
  if (static_cast<int>(waiting_.size()) < unfinished_) {
    changed();
    return block->wait("cluster_sync", site);
  }
  waiting_.pop_back();
  settle();
}

void Cluster::settle() {
  for (const Waiting& each : std::exchange(waiting_, {})) each.block->release(*each.thread);
}

void Cluster::thread_ended() {
  --unfinished_;
  changed();
  if (!waiting_.empty() && static_cast<int>(waiting_.size()) == unfinished_) settle();
}

Block& Cluster::peer(int rank, const char* name, const Site& site) {
  if (rank < 0 || rank >= size()) {
    fault(site, name, ": block ", rank, " of a cluster of ", size());
  }
  if (blocks_[rank]->ended()) fault(site, name, ": block ", rank, " of the cluster has exited");
  return *blocks_[rank];
}

}  // namespace gossamer::emulation
