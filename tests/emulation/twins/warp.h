#pragma once
// CUDA's own operations of a warp and of a block, under their CUDA names.
#include "twins/cuda_language.h"

namespace gossamer::emulation {

// An instruction that all 32 lanes execute together, at one line of the kernel: `all` runs once, on
// pointers to what each lane gives and gets.
template <class In, class Out, class F>
void whole_warp(const char* name, const In& in, Out& out, const F& all, const Site& site) {
  if (block->lanes_of_warp() != kFullMask) {
    fault(site, name, ": needs all 32 lanes, and the block's last warp has fewer");
  }
  block->meet(
      name, kFullMask, true, &in, &out,
      [&all](const Block::Lanes& lanes) {
        const In* ins[kWarpSize];
        Out* outs[kWarpSize];
        for (int lane = 0; lane < kWarpSize; ++lane) {
          ins[lane] = static_cast<const In*>(lanes[lane]->in);
          outs[lane] = static_cast<Out*>(lanes[lane]->out);
        }
        all(ins, outs);
      },
      site);
}

// A lane's part in `__shfl*_sync`: what it gives, and which lane it wants.
template <class T>
struct Exchange {
  T value;
  int from;
};

template <class T>
T exchange(const char* name, uint32_t mask, T value, int from, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 4 or 8 bytes");
  const Exchange<T> in{value, from};
  T out;
  block->meet(
      name, mask, true, &in, &out,
      [&site](const Block::Lanes& lanes) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if (lanes[lane] == nullptr) continue;
          const int source = static_cast<const Exchange<T>*>(lanes[lane]->in)->from;
          if ((block->lanes_of_warp() >> source & 1) == 0) {
            poison(lanes[lane]->out, sizeof(T));  // no such lane in this block: undefined
            continue;
          }
          if (lanes[source] == nullptr) {
            fault(site, lanes[lane]->operation, ": lane ", lane, " reads lane ", source,
                  ", which the mask leaves out");
          }
          *static_cast<T*>(lanes[lane]->out) =
              static_cast<const Exchange<T>*>(lanes[source]->in)->value;
        }
      },
      site);
  return out;
}

// The first lane of the `width` lanes that this lane shuffles among.
inline int segment_begin(int width, const char* name, const Site& site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fault(site, name, ": width ", width, " is not a power of two up to 32");
  }
  return running->lane & ~(width - 1);
}

// Every lane gets reduce(all lanes' values), a word.
template <class T, class Reduce>
T reduce(const char* name, uint32_t mask, T value, const Reduce& reduce_two, const Site& site) {
  T out;
  block->meet(
      name, mask, true, &value, &out,
      [&reduce_two](const Block::Lanes& lanes) {
        T total{};
        bool first = true;
        for (const Meeting* lane : lanes) {
          if (lane == nullptr) continue;
          const T one = *static_cast<const T*>(lane->in);
          total = first ? one : reduce_two(total, one);
          first = false;
        }
        for (const Meeting* lane : lanes) {
          if (lane != nullptr) *static_cast<T*>(lane->out) = total;
        }
      },
      site);
  return out;
}

inline uint32_t ballot(const char* name, uint32_t mask, bool vote, const Site& site) {
  const uint32_t bit = vote ? 1u << running->lane : 0u;
  return reduce(name, mask, bit, [](uint32_t a, uint32_t b) { return a | b; }, site);
}

// A block-wide barrier that sums one value of each thread; the sum is read before anybody can add
// to the next one, because that takes all threads.
inline int sync_and_count(const char* name, bool vote, const Site& site) {
  Block& here = *block;
  if (here.is_first_at_barrier(0)) here.counting = 0;
  here.counting += vote ? 1 : 0;
  here.barrier(0, here.thread_count, true, name, site, [&here] { here.counted = here.counting; });
  return here.counted;
}

}  // namespace gossamer::emulation

// ---- shuffles -----------------------------------------------------------------------------------

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              std::source_location site = std::source_location::current()) {
  using namespace gossamer::emulation;
  const int begin = segment_begin(width, "__shfl_sync", site);
  return exchange("__shfl_sync", mask, value, begin + (from & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  std::source_location site = std::source_location::current()) {
  using namespace gossamer::emulation;
  const int lane = running->lane, from = lane ^ lane_mask;
  // A lane of a later segment is out of reach, one of an earlier segment is not.
  const int end = segment_begin(width, "__shfl_xor_sync", site) + width;
  return exchange("__shfl_xor_sync", mask, value, from < end ? from : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location site = std::source_location::current()) {
  using namespace gossamer::emulation;
  const int lane = running->lane, from = lane - static_cast<int>(delta);
  const int begin = segment_begin(width, "__shfl_up_sync", site);
  return exchange("__shfl_up_sync", mask, value, from >= begin ? from : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location site = std::source_location::current()) {
  using namespace gossamer::emulation;
  const int lane = running->lane, from = lane + static_cast<int>(delta);
  const int end = segment_begin(width, "__shfl_down_sync", site) + width;
  return exchange("__shfl_down_sync", mask, value, from < end ? from : lane, site);
}

// ---- votes and reductions -----------------------------------------------------------------------

inline unsigned __ballot_sync(unsigned mask, int vote,
                              std::source_location site = std::source_location::current()) {
  return gossamer::emulation::ballot("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(unsigned mask, int vote,
                      std::source_location site = std::source_location::current()) {
  return gossamer::emulation::ballot("__any_sync", mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      std::source_location site = std::source_location::current()) {
  return gossamer::emulation::ballot("__all_sync", mask, vote == 0, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          std::source_location site = std::source_location::current()) {
  using namespace gossamer::emulation;
  unsigned out;
  block->meet(
      "__match_any_sync", mask, true, &value, &out,
      [](const Block::Lanes& lanes) {
        for (const Meeting* lane : lanes) {
          if (lane == nullptr) continue;
          unsigned same = 0;
          for (int other = 0; other < kWarpSize; ++other) {
            if (lanes[other] == nullptr) continue;
            const bool equal = std::memcmp(lane->in, lanes[other]->in, sizeof(T)) == 0;
            same |= (equal ? 1u : 0u) << other;
          }
          *static_cast<unsigned*>(lane->out) = same;
        }
      },
      site);
  return out;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value,
                    std::source_location site = std::source_location::current()) {
  const auto add = [](T a, T b) {  // wraps, as the GPU does
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  };
  return gossamer::emulation::reduce("__reduce_add_sync", mask, value, add, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value,
                    std::source_location site = std::source_location::current()) {
  const auto smaller = [](T a, T b) { return min(a, b); };
  return gossamer::emulation::reduce("__reduce_min_sync", mask, value, smaller, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value,
                    std::source_location site = std::source_location::current()) {
  const auto larger = [](T a, T b) { return max(a, b); };
  return gossamer::emulation::reduce("__reduce_max_sync", mask, value, larger, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 std::source_location site = std::source_location::current()) {
  const auto any = [](unsigned a, unsigned b) { return a | b; };
  return gossamer::emulation::reduce("__reduce_or_sync", mask, value, any, site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  std::source_location site = std::source_location::current()) {
  const auto both = [](unsigned a, unsigned b) { return a & b; };
  return gossamer::emulation::reduce("__reduce_and_sync", mask, value, both, site);
}

// ---- barriers -----------------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location site = std::source_location::current()) {
  gossamer::emulation::block->meet("__syncwarp", mask, false, nullptr, nullptr, [](auto&) {}, site);
}
inline void __syncthreads(std::source_location site = std::source_location::current()) {
  using gossamer::emulation::block;
  block->barrier(0, block->thread_count, true, "__syncthreads", site);
}
inline int __syncthreads_count(int vote,
                               std::source_location site = std::source_location::current()) {
  return gossamer::emulation::sync_and_count("__syncthreads_count", vote != 0, site);
}
inline int __syncthreads_or(int vote, std::source_location site = std::source_location::current()) {
  return gossamer::emulation::sync_and_count("__syncthreads_or", vote != 0, site) != 0;
}
inline int __syncthreads_and(int vote,
                             std::source_location site = std::source_location::current()) {
  return gossamer::emulation::sync_and_count("__syncthreads_and", vote == 0, site) == 0;
}
// All threads of a block run on one OS thread, and each sees what the others have stored.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, std::source_location site = std::source_location::current()) {
  gossamer::emulation::block->poll("__nanosleep", site);
}

template <class T>
T __ldg(const T* address, std::source_location site = std::source_location::current()) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) {
    gossamer::emulation::fault(site, "__ldg: the address is not a multiple of ", alignof(T));
  }
  return *address;
}

namespace gossamer::ptx {

inline void barrier_sync(int id, int threads, emulation::Site site = emulation::Site::current()) {
  emulation::block->barrier(id, threads, true, "barrier_sync", site);
}
inline void barrier_arrive(int id, int threads, emulation::Site site = emulation::Site::current()) {
  emulation::block->barrier(id, threads, false, "barrier_arrive", site);
}

}  // namespace gossamer::ptx
