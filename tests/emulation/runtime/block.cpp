#include "runtime/block.h"

#include <algorithm>

namespace gossamer::emulation {
namespace {

struct Cancelled {};  // unwinds the threads that are left after a fault

// Polls in a row, without anything having changed, that count as a deadlock.
constexpr int kPatience = 200'000;

// In the late schedule, the threads of a warp that run before another warp's turn comes: enough for
// all of its lanes to get to their next meeting while other warps have not begun.
constexpr int kTurns = kWarpSize;

std::string text_of(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

}  // namespace

std::string where_running() {
  if (block == nullptr) return "";
  std::string text = "block " + text_of(block->index);
  if (running != nullptr) {
    text += " thread " + text_of(running->index) + " (warp " + std::to_string(running->warp) +
            " lane " + std::to_string(running->lane) + ")";
  }
  return text + " at ";
}

Block::Block(dim3 grid_, dim3 size_, SharedMemory& shared_, const std::function<void()>& kernel)
    : grid(grid_),
      size(size_),
      shared(shared_),
      thread_count(static_cast<int>(size_.x * size_.y * size_.z)),
      random(schedule.seed),
      kernel_(kernel),
      ready_((thread_count + kWarpSize - 1) / kWarpSize) {
  for (int i = 0; i < thread_count; ++i) {
    auto thread = std::make_unique<Thread>();
    const auto linear = static_cast<unsigned>(i);
    thread->index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
    thread->linear = i;
    thread->warp = i / kWarpSize;
    thread->lane = i % kWarpSize;
    threads.push_back(std::move(thread));
  }
}

void Block::run(dim3 block_index) {
  index = block_index;
  shared.begin_block();
  for (Barrier& barrier : barriers_) barrier = {};
  for (auto& lanes : ready_) lanes.clear();
  unfinished_ = thread_count;
  polls_ = 0;
  current_warp_ = -1;
  turns_left_ = 0;
  cancelled_ = false;
  failure_.clear();
  for (auto& thread : threads) {
    thread->fiber.prepare([this, t = thread.get()] { run_thread(*t); });
    make_ready(*thread);
  }
  try {
    while (unfinished_ > 0) {
      Thread* next = pick();
      if (next == nullptr) deadlock("no thread can go on");
      running = next;
      next->fiber.resume();
      running = nullptr;
      if (!failure_.empty()) throw Fault(failure_);
    }
    shared.end_block();
  } catch (...) {
    cancel_unfinished();
    throw;
  }
}

// ---- the scheduler ------------------------------------------------------------------------------

void Block::make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  ready_[thread.warp].push_back(thread.lane);
}

Thread* Block::pick() {
  if (polls_ > kPatience) deadlock("threads poll for something that does not come");
  const int warps = static_cast<int>(ready_.size());
  const bool stay = schedule.early || turns_left_-- > 0;
  if (stay && current_warp_ >= 0 && !ready_[current_warp_].empty()) return pick_from(current_warp_);
  turns_left_ = schedule.seed == 0 ? kTurns : 1 << random.below(12);
  const int first = schedule.seed == 0 ? current_warp_ + 1 : static_cast<int>(random.below(warps));
  for (int i = 0; i < warps; ++i) {
    const int warp = (first + i) % warps;
    if (!ready_[warp].empty()) return pick_from(warp);
  }
  return nullptr;
}

Thread* Block::pick_from(int warp) {
  current_warp_ = warp;
  std::vector<int>& lanes = ready_[warp];
  const auto count = static_cast<uint32_t>(lanes.size());
  const auto chosen = lanes.begin() + (schedule.seed == 0 ? 0 : random.below(count));
  Thread* thread = threads[warp * kWarpSize + *chosen].get();
  lanes.erase(chosen);
  return thread;
}

void Block::run_thread(Thread& thread) {
  try {
    kernel_();
    finish(thread);
  } catch (const Cancelled&) {
  } catch (const Fault& error) {
    if (failure_.empty()) failure_ = error.what();
  } catch (const std::exception& error) {
    if (failure_.empty()) failure_ = where_running() + "an exception: " + error.what();
  }
  thread.state = Thread::State::kDone;
  thread.open_copies.clear();
  thread.copy_groups.clear();
  thread.meeting = {};
  --unfinished_;
  changed();
}

void Block::finish(Thread& thread) {
  if (!thread.open_copies.empty()) {
    fault(thread.open_copies[0].site, "a cp.async that was never committed nor waited for");
  }
  for (const std::vector<Copy>& group : thread.copy_groups) {
    if (group.empty()) continue;
    fault(group[0].site, "a cp.async that no wait covered before its thread ended");
  }
}

void Block::cancel_unfinished() {
  cancelled_ = true;
  for (auto& thread : threads) {
    if (thread->state == Thread::State::kDone || !thread->fiber.started()) continue;
    running = thread.get();
    thread->fiber.resume();
  }
  running = nullptr;
}

void Block::suspend(Thread& thread, const char* waits_for, const Site& site) {
  thread.waits_for = waits_for;
  thread.waits_at = site;
  thread.fiber.suspend();
  if (cancelled_) throw Cancelled{};
}

void Block::wait(const char* waits_for, const Site& site) {
  Thread& thread = *running;
  thread.state = Thread::State::kBlocked;
  suspend(thread, waits_for, site);
}

void Block::release(Thread& thread) {
  make_ready(thread);
  changed();
}

void Block::poll(const char* waits_for, const Site& site) {
  ++polls_;
  current_warp_ = -1;  // also in the early schedule: what it waits for may be another warp's to do
  preempt(waits_for, site);
}

void Block::preempt(const char* waits_for, const Site& site) {
  make_ready(*running);
  suspend(*running, waits_for, site);
}

void Block::deadlock(const char* reason) {
  std::ostringstream text;
  text << where_running() << "deadlock: " << reason << '\n';
  for (size_t warp = 0; warp < ready_.size(); ++warp) {
    std::vector<std::pair<std::string, std::string>> places;  // where, which lanes
    for (int i = static_cast<int>(warp) * kWarpSize;
         i < std::min(thread_count, static_cast<int>(warp + 1) * kWarpSize); ++i) {
      const Thread& thread = *threads[i];
      const std::string place =
          thread.state == Thread::State::kDone
              ? "returned"
              : std::string(thread.waits_for) + " at " + emulation::text_of(thread.waits_at);
      if (places.empty() || places.back().first != place) places.emplace_back(place, "");
      places.back().second += " " + std::to_string(thread.lane);
    }
    text << "  warp " << warp << ':';
    if (places.size() == 1) {
      text << " all lanes: " << places[0].first;
    } else {
      for (const auto& [place, lanes] : places) text << " lanes" << lanes << ": " << place << ';';
    }
    text << '\n';
  }
  for (size_t id = 0; id < barriers_.size(); ++id) {
    if (barriers_[id].arrived == 0) continue;
    text << "  barrier " << id << ": " << barriers_[id].arrived << " of " << barriers_[id].expected
         << " threads are there\n";
  }
  throw Fault(text.str());
}

// ---- where threads meet -------------------------------------------------------------------------

uint32_t Block::lanes_of_warp() const {
  const int left = thread_count - running->warp * kWarpSize;
  return left >= kWarpSize ? kFullMask : (1u << left) - 1;
}

void Block::meet(const char* name, uint32_t mask, bool same_line, const void* in, void* out,
                 const std::function<void(const Lanes&)>& operation, const Site& site) {
  Thread& self = *running;
  mask &= lanes_of_warp();  // lanes that the block's size leaves out count as having returned
  if ((mask >> self.lane & 1) == 0) {
    fault(site, name, ": the mask leaves out the lane that calls it");
  }
  self.meeting = {name, site, mask, same_line, in, out};
  Lanes lanes{};
  bool complete = true;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& other = *threads[self.warp * kWarpSize + lane];
    const Meeting& theirs = other.meeting;
    if (other.state == Thread::State::kDone) {
      fault(site, name, ": the mask names lane ", lane, ", which has returned");
    }
    if (theirs.operation == nullptr) {
      complete = false;
      continue;
    }
    if (std::string_view(theirs.operation) != name || theirs.mask != mask ||
        (same_line && !same_site(theirs.site, site))) {
      fault(site, name, " (mask 0x", std::hex, mask, ") meets ", theirs.operation, " (mask 0x",
            theirs.mask, std::dec, ") of lane ", lane, " at ", emulation::text_of(theirs.site),
            ": the lanes of a warp must execute the same operation");
    }
    lanes[lane] = &other.meeting;
  }
  if (!complete) return wait(name, site);
  operation(lanes);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane] == nullptr) continue;
    lanes[lane]->operation = nullptr;
    if (lane != self.lane) release(*threads[self.warp * kWarpSize + lane]);
  }
}

void Block::barrier(int id, int expected, bool waits, const char* name, const Site& site,
                    const std::function<void()>& combine) {
  Thread& self = *running;
  if (id < 0 || id >= static_cast<int>(barriers_.size())) {
    fault(site, name, ": barrier ", id, " is not one of 0 to 15");
  }
  if (expected < 1 || expected > thread_count ||
      (expected % kWarpSize != 0 && expected != thread_count)) {
    fault(site, name, ": barrier ", id, " for ", expected, " threads in a block of ", thread_count,
          ": must be whole warps of it");
  }
  Barrier& here = barriers_[id];
  if (here.arrived == 0) {
    here.expected = expected;
    here.site = site;
    here.is_here.assign(thread_count, 0);
  } else if (here.expected != expected) {
    fault(site, name, ": barrier ", id, " for ", expected, " threads, but ",
          emulation::text_of(here.site), " says ", here.expected);
  }
  if (here.is_here[self.linear]) {
    fault(site, name, ": this thread arrives a second time at barrier ", id, ", where only ",
          here.arrived, " of ", expected, " threads have come");
  }
  for (const Thread* other : here.waiting) {
    if (other->warp == self.warp && !same_site(other->waits_at, site)) {
      fault(site, name, " meets ", other->waits_for, " of lane ", other->lane, " at ",
            emulation::text_of(other->waits_at),
            ": the lanes of a warp must execute the same barrier");
    }
  }
  here.is_here[self.linear] = 1;
  if (++here.arrived < expected) {
    changed();
    if (!waits) return;
    here.waiting.push_back(&self);
    return wait(name, site);
  }
  if (combine) combine();
  here.arrived = 0;
  for (Thread* thread : here.waiting) release(*thread);
  here.waiting.clear();
}

}  // namespace gossamer::emulation
