#pragma once
// One thread block: a fiber per thread, and the points where threads meet (barriers and operations
// of a warp). Its cluster's scheduler runs them in turn.
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/fault.h"
#include "runtime/fiber.h"
#include "runtime/products.h"
#include "runtime/schedule.h"
#include "runtime/shared_memory.h"
#include "runtime/transactions.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace gossamer::emulation {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// A cp.async that has been issued: it arrives when its thread waits for it.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;  // bytes past `valid` become zero
  Site site;
};

// A TMA store that has been issued: it reads shared memory when its thread waits for it.
struct Store {
  std::function<void()> land;
  Site site;
};

// What a lane brings to an operation of its warp while it waits for the others.
struct Meeting {
  const char* operation = nullptr;
  Site site;
  uint32_t mask = 0;
  bool same_line = true;  // whether all lanes must come from the same line of the kernel
  const void* in = nullptr;
  void* out = nullptr;
};

struct Thread {
  enum class State : uint8_t { kReady, kBlocked, kDone };

  dim3 index;
  int linear = 0, warp = 0, lane = 0;
  State state = State::kReady;
  const char* waits_for = "";  // for the report of a deadlock
  Site waits_at;
  Meeting meeting;
  std::vector<Copy> open_copies;              // not committed yet
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::vector<Store> open_stores;             // the same for TMA's stores
  std::deque<std::vector<Store>> store_groups;
  Fiber fiber;
};

// The block and thread whose code is running; null outside a launch.
class Block;
class Cluster;
inline Block* block = nullptr;
inline Thread* running = nullptr;

class Block {
 public:
  Block(Cluster& cluster, int rank, dim3 grid, dim3 block, size_t shared_bytes,
        const std::function<void()>& kernel);

  // ---- for the twins: called on the running thread --------------------------------------------
  // Waits until release() is called for this thread. The two texts tell a deadlock's reader where.
  void wait(const char* waits_for, const Site& site);
  void release(Thread& thread);
  // Lets others run, for somebody who asks again and again whether something has changed.
  void poll(const char* waits_for, const Site& site);
  // Lets others run at a place where the GPU might; a random schedule wants it at atomics.
  void preempt(const char* waits_for, const Site& site);
  void changed();  // something that a poll may be after

  // Runs `operation` once, when every lane of `mask` is here, on what all of them brought.
  using Lanes = std::array<Meeting*, kWarpSize>;
  void meet(const char* name, uint32_t mask, bool same_line, const void* in, void* out,
            const std::function<void(const Lanes&)>& operation, const Site& site);
  uint32_t lanes_of_warp() const;  // those that the block's size gives this thread's warp

  // Named barrier `id` of `threads` threads; arriving alone does not wait. A block-wide barrier may
  // also combine what its threads bring: `combine` runs once, when all are here.
  void barrier(int id, int threads, bool waits, const char* name, const Site& site,
               const std::function<void()>& combine = {});
  bool is_first_at_barrier(int id) const { return barriers_[id].arrived == 0; }

  Cluster& cluster;
  int rank;  // in the cluster
  dim3 grid, size, index;
  SharedMemory shared;
  int thread_count;
  std::vector<std::unique_ptr<Thread>> threads;
  Random& random;  // the cluster's
  Transactions transactions;
  int counting = 0, counted = 0;  // at a barrier that counts votes

  // The products of the running thread's warp. Those of a warpgroup must all be the same:
  // `check_issue` compares the running warp's next one, by line and descriptors, with that of the
  // other warps.
  Products& products() { return warps_[running->warp].products; }
  void check_warpgroup(const char* name, const Site& site) const;  // that it has four warps
  void check_issue(const Site& site, uint64_t a, uint64_t b);

  // ---- for the cluster --------------------------------------------------------------------------
  void begin(dim3 index);
  void end_if_finished();    // throws what went wrong, or what the block left undone at its end
  void cancel_unfinished();  // unwinds the threads that are left after a fault
  bool ended() const { return unfinished_ == 0; }
  int warp_count() const { return static_cast<int>(warps_.size()); }
  std::vector<int>& ready_of(int warp) { return warps_[warp].ready; }
  std::string report(bool with_index) const;  // where its threads are, for that of a deadlock

 private:
  struct Warp {
    std::vector<int> ready;  // lanes, in the order in which they became ready
    uint32_t meeting = 0;    // lanes that wait for others in meet()
    uint32_t returned = 0;   // lanes whose thread has ended
    Products products;
  };
  struct Issue {
    Site site;
    uint64_t a, b;
  };
  struct Barrier {
    int expected = 0, arrived = 0;
    Site site;                     // of its first arrival
    std::vector<uint8_t> is_here;  // a thread may arrive only once before all have
    std::vector<Thread*> waiting;
  };

  void make_ready(Thread& thread);
  void run_thread(Thread& thread);
  void finish(Thread& thread);
  void check_warpgroups() const;
  void suspend(Thread& thread, const char* waits_for, const Site& site);

  const std::function<void()>& kernel_;
  std::vector<Warp> warps_;
  std::vector<std::vector<Issue>> issues_;  // by warpgroup, in order
  std::array<Barrier, 16> barriers_;
  int unfinished_ = 0;
  bool cancelled_ = false;
  std::string failure_;
};

}  // namespace gossamer::emulation
