#pragma once
// The order in which threads run and the moment at which asynchronous copies arrive. A real GPU may
// choose any; two extremes catch different faults:
//
//   late   warps take turns, and copies arrive at the last moment, when somebody waits for them: a
//          missing wait, commit or barrier reads poison
//   early  copies arrive at once, and a warp runs on until it must wait for other warps: data that
//          somebody still reads are overwritten, overruns hit what is already there
//
// Seed 0 goes by index; any other seed draws the order of blocks, warps and lanes at random.
#include <cstdint>

namespace gossamer::emulation {

struct Schedule {
  bool early = false;
  uint64_t seed = 0;
};

inline Schedule schedule;  // of the launches to come

// Small and repeatable everywhere (SplitMix64's step and mix).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t below(uint32_t bound) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
  }

 private:
  uint64_t state_;
};

}  // namespace gossamer::emulation
