#pragma once
// The blocks of one cluster, which run together: the scheduler that gives their warps turns, and
// what one block asks of another.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/block.h"

namespace gossamer::emulation {

class Cluster {
 public:
  static constexpr int kMaxBlocks = 8;

  Cluster(int blocks, dim3 grid, dim3 block, size_t shared_bytes,
          const std::function<void()>& kernel);
  void run(dim3 first);  // all blocks, from the one of rank 0 on; throws the first fault

  // ---- for the twins --------------------------------------------------------------------------
  // Where all threads of the cluster that have not ended meet.
  void sync(const Site& site);
  // A block that the running one reaches into: it must be there, and still run.
  Block& peer(int rank, const char* name, const Site& site);
  int size() const { return static_cast<int>(blocks_.size()); }

  // ---- for the blocks ---------------------------------------------------------------------------
  void leave_warp() { current_warp_ = -1; }  // also in the early schedule, another one comes next
  void end_turn() { turns_left_ = 0; }
  void polled() { ++polls_; }
  void changed() { polls_ = 0; }  // something that a poll may be after
  void thread_ended();

  Random random;

 private:
  struct Warp {
    Block* block;
    int first_thread;         // in the block
    std::vector<int>* ready;  // lanes, in the order in which they became ready
  };
  struct Waiting {
    Block* block;
    Thread* thread;
  };

  Thread* pick();
  Thread* pick_from(int warp);
  bool land_one();
  void settle();
  [[noreturn]] void deadlock(const char* reason);

  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Warp> warps_;  // of all blocks, those of rank 0 first
  int current_warp_ = -1, turns_left_ = 0;
  int polls_ = 0;  // since anything last changed
  int unfinished_ = 0;
  std::vector<Waiting> waiting_;  // at sync()
};

}  // namespace gossamer::emulation
