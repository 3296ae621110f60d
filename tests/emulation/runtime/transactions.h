#pragma once
// Hopper's asynchronous copies into shared memory, and the mbarriers that count them.
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "runtime/fault.h"

namespace gossamer::emulation {

class Block;
struct Thread;

class Transactions {
 public:
  explicit Transactions(Block& block) : block_(block) {}
  void begin_block();
  void end_block();  // throws if a copy is still under way
  std::string report() const;

  void init(uint64_t* barrier, int count, const Site& site);
  void inval(uint64_t* barrier, const Site& site);
  void arrive(uint64_t* barrier, int bytes_expected, const char* name, const Site& site);
  bool ended(uint64_t* barrier, uint32_t parity, const char* name, const Site& site);
  void wait(uint64_t* barrier, const char* name, const Site& site);  // for the current phase

  // A copy whose `bytes` count towards `barrier`: it lands at once, or when nobody else can go on.
  void submit(uint64_t* barrier, int bytes, std::function<void()> land, const char* name,
              const Site& site);
  // Copies that count as an arrival at `barrier` when they land.
  void submit_arrival(uint64_t* barrier, std::function<void()> land, const char* name,
                      const Site& site);
  bool land_one();  // false if none is under way

 private:
  struct Barrier {
    int count, pending;
    int64_t bytes = 0;  // expected and not yet copied; less than 0 where they came first
    uint32_t phase = 0;
    Site site;
    std::vector<Thread*> waiting;
  };
  struct Load {
    uint64_t* barrier;
    int bytes, arrivals;
    std::function<void()> land;
    Site site;
  };
  Barrier& find(uint64_t* barrier, const char* name, const Site& site);
  void settle(Barrier& barrier);  // ends the phase if nothing is left to come

  Block& block_;
  std::map<size_t, Barrier> barriers_;  // by offset in shared memory
  std::vector<Load> loads_;
};

}  // namespace gossamer::emulation
