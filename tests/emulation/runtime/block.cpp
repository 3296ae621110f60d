#include "runtime/block.h"

#include <algorithm>
#include <bit>

#include "runtime/cluster.h"

namespace gossamer::emulation {
namespace {

struct Cancelled {};  // unwinds the threads that are left after a fault

constexpr int kWarpsOfGroup = 4;

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

Block::Block(Cluster& cluster_, int rank_, dim3 grid_, dim3 size_, size_t shared_bytes,
             const std::function<void()>& kernel)
    : cluster(cluster_),
      rank(rank_),
      grid(grid_),
      size(size_),
      shared(shared_bytes),
      thread_count(static_cast<int>(size_.x * size_.y * size_.z)),
      random(cluster_.random),
      transactions(*this),
      kernel_(kernel),
      warps_((thread_count + kWarpSize - 1) / kWarpSize) {
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

void Block::begin(dim3 block_index) {
  index = block_index;
  shared.begin_block();
  transactions.begin_block();
  for (Barrier& barrier : barriers_) barrier = {};
  issues_.assign((warps_.size() + kWarpsOfGroup - 1) / kWarpsOfGroup, {});
  for (Warp& warp : warps_) warp = {};
  unfinished_ = thread_count;
  cancelled_ = false;
  failure_.clear();
  for (auto& thread : threads) {
    thread->fiber.prepare([this, t = thread.get()] { run_thread(*t); });
    make_ready(*thread);
  }
}

void Block::end_if_finished() {
  if (!failure_.empty()) throw Fault(failure_);
  if (unfinished_ > 0) return;
  transactions.end_block();
  check_warpgroups();
  shared.end_block();
}

// ---- threads
// --------------------------------------------------------------------------------------

void Block::make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  warps_[thread.warp].ready.push_back(thread.lane);
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
  thread.open_stores.clear();
  thread.store_groups.clear();
  warps_[thread.warp].returned |= 1u << thread.lane;
  --unfinished_;
  cluster.thread_ended();
}

void Block::finish(Thread& thread) {
  if (!thread.open_copies.empty()) {
    fault(thread.open_copies[0].site, "a cp.async that was never committed nor waited for");
  }
  for (const std::vector<Copy>& group : thread.copy_groups) {
    if (group.empty()) continue;
    fault(group[0].site, "a cp.async that no wait covered before its thread ended");
  }
  if (!thread.open_stores.empty()) {
    fault(thread.open_stores[0].site, "a TMA store that was never committed nor waited for");
  }
  for (const std::vector<Store>& group : thread.store_groups) {
    if (group.empty()) continue;
    fault(group[0].site, "a TMA store that no wait covered before its thread ended");
  }
  const Product* pending = warps_[thread.warp].products.first_pending();
  if (pending != nullptr)
    fault(pending->site, "a wgmma that no wait covered before its thread ended");
}

// ---- warpgroups ---------------------------------------------------------------------------------

void Block::check_warpgroup(const char* name, const Site& site) const {
  const int group = running->warp / kWarpsOfGroup;
  if (static_cast<int>(warps_.size()) < (group + 1) * kWarpsOfGroup) {
    fault(site, name, ": needs four warps, and the block's last warpgroup has fewer");
  }
}

void Block::check_issue(const Site& site, uint64_t a, uint64_t b) {
  check_warpgroup("wgmma", site);
  const int group = running->warp / kWarpsOfGroup;
  std::vector<Issue>& issues = issues_[group];
  const size_t next = products().issued();
  if (next == issues.size()) issues.push_back({site, a, b});
  const Issue& theirs = issues[next];
  if (!same_site(theirs.site, site) || theirs.a != a || theirs.b != b) {
    fault(site, "wgmma number ", next,
          " of this warp differs from another warp's of the warpgroup, at ",
          emulation::text_of(theirs.site),
          same_site(theirs.site, site) ? " (in a descriptor)" : "");
  }
}

void Block::check_warpgroups() const {
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    const std::vector<Issue>& issues = issues_[warp / kWarpsOfGroup];
    const size_t issued = warps_[warp].products.issued();
    if (issued == issues.size()) continue;
    fault(issues[issued].site, "wgmma number ", issued, " was not executed by warp ", warp,
          ", only by others of its warpgroup");
  }
}

void Block::cancel_unfinished() {
  cancelled_ = true;
  block = this;
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

void Block::changed() { cluster.changed(); }

void Block::poll(const char* waits_for, const Site& site) {
  cluster.polled();
  cluster.leave_warp();  // what it waits for may be another warp's to do
  preempt(waits_for, site);
}

void Block::preempt(const char* waits_for, const Site& site) {
  make_ready(*running);
  if (random.below(2) == 0) cluster.end_turn();
  suspend(*running, waits_for, site);
}

std::string Block::report(bool with_index) const {
  std::ostringstream text;
  if (with_index) text << "  block " << text_of(index) << ":\n";
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
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
  text << transactions.report();
  return text.str();
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
  Warp& warp = warps_[self.warp];
  if ((mask & warp.returned) != 0) {
    fault(site, name, ": the mask names lane ", std::countr_zero(mask & warp.returned),
          ", which has returned");
  }
  self.meeting = {name, site, mask, same_line, in, out};
  const auto check = [&](int lane) {
    const Meeting& theirs = threads[self.warp * kWarpSize + lane]->meeting;
    if (std::string_view(theirs.operation) == name && theirs.mask == mask &&
        (!same_line || same_site(theirs.site, site))) {
      return;
    }
    fault(site, name, " (mask 0x", std::hex, mask, ") meets ", theirs.operation, " (mask 0x",
          theirs.mask, std::dec, ") of lane ", lane, " at ", emulation::text_of(theirs.site),
          ": the lanes of a warp must execute the same operation");
  };
  // The first one stands for all that came before: each of them was checked against it.
  const uint32_t others = warp.meeting & mask;
  if (others != 0) check(std::countr_zero(others));
  warp.meeting |= 1u << self.lane;
  if ((warp.meeting & mask) != mask) return wait(name, site);
  Lanes lanes{};
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    lanes[lane] = &threads[self.warp * kWarpSize + lane]->meeting;
    if (lanes[lane]->mask != mask) check(lane);  // came with lanes that this mask leaves out
  }
  operation(lanes);
  warp.meeting &= ~mask;
  for (uint32_t left = mask & ~(1u << self.lane); left != 0; left &= left - 1) {
    release(*threads[self.warp * kWarpSize + std::countr_zero(left)]);
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
