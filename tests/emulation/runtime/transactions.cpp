#include "runtime/transactions.h"

#include <utility>

#include "runtime/block.h"

namespace gossamer::emulation {
namespace {

// What an mbarrier's eight bytes hold here: enough to notice that somebody else wrote to them.
constexpr uint64_t kMark = 0x676f7373616d6572;

}  // namespace

void Transactions::begin_block() {
  barriers_.clear();
  loads_.clear();
}

void Transactions::end_block() {
  if (loads_.empty()) return;
  fault(loads_[0].site, "a copy into shared memory that nobody waited for before the block ended");
}

std::string Transactions::report() const {
  std::string text;
  for (const auto& [offset, barrier] : barriers_) {
    text += "  mbarrier at offset " + std::to_string(offset) + " (" + text_of(barrier.site) +
            "): phase " + std::to_string(barrier.phase) + " wants " +
            std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
            " arrivals and " + std::to_string(barrier.bytes) + " bytes\n";
  }
  return text;
}

void Transactions::init(uint64_t* barrier, int count, const Site& site) {
  const size_t offset = block_.shared.check(barrier, 8, 8, "mbarrier_init", site);
  if (count < 1 || count >= 1 << 20) fault(site, "mbarrier_init: a count of ", count);
  if (barriers_.count(offset) != 0) {
    fault(site, "mbarrier_init: there is one at offset ", offset, " already, of ",
          text_of(barriers_.at(offset).site));
  }
  block_.shared.async_write(offset, &kMark, sizeof kMark);
  barriers_[offset] = {count, count, 0, 0, site, {}};
}

void Transactions::inval(uint64_t* barrier, const Site& site) {
  find(barrier, "mbarrier_inval", site);
  barriers_.erase(block_.shared.check(barrier, 8, 8, "mbarrier_inval", site));
  poison(barrier, sizeof *barrier);
}

Transactions::Barrier& Transactions::find(uint64_t* barrier, const char* name, const Site& site) {
  const size_t offset = block_.shared.check(barrier, 8, 8, name, site);
  const auto found = barriers_.find(offset);
  if (found == barriers_.end()) {
    fault(site, name, ": no mbarrier was initialised at offset ", offset);
  }
  if (*barrier != kMark) fault(site, name, ": the mbarrier at offset ", offset, " was overwritten");
  return found->second;
}

void Transactions::settle(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  for (Thread* thread : std::exchange(barrier.waiting, {})) block_.release(*thread);
}

void Transactions::arrive(uint64_t* barrier, int bytes_expected, const char* name,
                          const Site& site) {
  Barrier& here = find(barrier, name, site);
  if (here.pending == 0) fault(site, name, ": more than the ", here.count, " arrivals of a phase");
  here.bytes += bytes_expected;
  --here.pending;
  block_.changed();
  settle(here);
  // Whoever has waited for this may run before this thread does.
  if (schedule.seed != 0) block->preempt(name, site);
}

bool Transactions::ended(uint64_t* barrier, uint32_t parity, const char* name, const Site& site) {
  if (parity > 1) fault(site, name, ": a parity of ", parity);
  return (find(barrier, name, site).phase & 1) != parity;
}

void Transactions::wait(uint64_t* barrier, const char* name, const Site& site) {
  find(barrier, name, site).waiting.push_back(running);
  block_.wait(name, site);
}

void Transactions::submit(uint64_t* barrier, int bytes, std::function<void()> land,
                          const char* name, const Site& site) {
  find(barrier, name, site);
  loads_.push_back({barrier, bytes, 0, std::move(land), site});
  if (schedule.early) land_one();
}

void Transactions::submit_arrival(uint64_t* barrier, std::function<void()> land, const char* name,
                                  const Site& site) {
  find(barrier, name, site);
  loads_.push_back({barrier, 0, 1, std::move(land), site});
  if (schedule.early) land_one();
}

bool Transactions::land_one() {
  if (loads_.empty()) return false;
  const auto count = static_cast<uint32_t>(loads_.size());
  const auto chosen = loads_.begin() + (schedule.seed == 0 ? 0 : block_.random.below(count));
  const Load load = std::move(*chosen);
  loads_.erase(chosen);
  load.land();
  Barrier& barrier = find(load.barrier, "a copy that arrives", load.site);
  barrier.bytes -= load.bytes;
  if (barrier.pending < load.arrivals) {
    fault(load.site, "more than the ", barrier.count, " arrivals of a phase");
  }
  barrier.pending -= load.arrivals;
  block_.changed();
  settle(barrier);
  return true;
}

}  // namespace gossamer::emulation
