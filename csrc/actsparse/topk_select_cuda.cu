// The k largest entries of each row, largest first, of equal ones the lower index first; NaN is the
// largest.
//
// A thread block takes a row, and reads it twice. The first time each thread keeps the largest
// entry of two groups; k groups have an entry of at least the k-th largest of these, so the row has
// k of at least that. The second time those are collected, which are few more than k, and sorted:
//
//   row     .3 -1  2 .1 | 0 .7 -3 .2 | ..          1024 groups
//   maxima   2            .7                       the k-th largest of them: the bound
//   keys    (2, index 2) ..                        what is not below the bound
//
// Where more are collected than there is room for (rows of equal entries, of NaNs, or k near the
// number of groups), a radix select finds the k-th largest key, 8 bits a reading of the row.
//
// A key orders as entries do: the number in the upper half, and below it the index, turned round.
//
// By arithmetic, not measured, with 131072 columns of bfloat16: a row of 256 KB comes from memory
// once, and the second time from the L2, since a multiprocessor then has one block (34 MB on an
// H100, of 50). Its threads have 16 KB on their way, 20 bytes a cycle; memory gives 15 and the L2
// 25. An entry costs 3 to 4 instructions a reading, which allow 60 to 75 bytes a cycle. torch.topk
// finds 2 bits a reading and then reads twice: 10 readings of bfloat16, 18 of float32. The barriers
// of the bound and of sorting take some 3000 cycles, which the other blocks of a multiprocessor
// fill where rows are short; memory takes 2200 to bring 16384 columns.
#include <algorithm>
#include <type_traits>

#include "actsparse/topk_launch.h"
#include "common/check.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace gossamer::actsparse::topk {
namespace {

constexpr int kThreads = 512;
constexpr int kRoom = 2048;  // keys that are sorted
constexpr int kDigits = 256;
constexpr int kAtOnce = 2;                // that a thread has on their way
constexpr uint32_t kLeast = 0x007fffffu;  // order_of(-inf)
static_assert(kMostSelected == 2 * kThreads, "two groups a thread");

struct Shared {
  SharedTile<uint64_t, kRoom> keys;
  SharedTile<int, kDigits> counts;
  SharedTile<int, 3> found;  // keys collected; a digit, and how many keys of it are wanted
};

// Of numbers as unsigned as they compare as floats.
__device__ __forceinline__ uint32_t order_of(float x) {
  uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);  // -0 equals 0
  bits = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return x != x ? ~0u : bits;
}
__device__ __forceinline__ float number_of(uint32_t order) {
  return __uint_as_float((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}
__device__ __forceinline__ uint64_t key_of(float x, uint32_t index) {
  return static_cast<uint64_t>(order_of(x)) << 32 | ~index;
}

// What a thread reads of a row at once: a piece of 16 bytes, or where rows do not allow that, every
// 512th. Past the end it reads again what is there, and takes the least numbers for it.
template <class T, bool kPieces>
struct Entries;

template <class T>
struct Entries<T, true> {
  static constexpr int kEach = 16 / sizeof(T), kStep = 1;
  uint4 piece;
  __device__ void load(const T* row, uint32_t mine, uint32_t width) {
    piece = *reinterpret_cast<const uint4*>(row + min(mine, width - kEach));
  }
  __device__ void widen(uint32_t mine, uint32_t width, float (&entries)[kEach]) const {
    uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
    const uint32_t least = std::is_same_v<T, Float16> ? 0xfc00fc00u : 0xff80ff80u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (mine >= width) words[i] = sizeof(T) == 4 ? 0xff800000u : least;
      if constexpr (sizeof(T) == 4) {
        entries[i] = __uint_as_float(words[i]);
      } else {
        const float2 two = ptx::unpack<T>(words[i]);
        entries[2 * i] = two.x, entries[2 * i + 1] = two.y;
      }
    }
  }
};

template <class T>
struct Entries<T, false> {
  static constexpr int kEach = 4, kStep = kThreads;
  T some[kEach];
  __device__ void load(const T* row, uint32_t mine, uint32_t width) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) some[i] = row[min(mine + i * kStep, width - 1)];
  }
  __device__ void widen(uint32_t mine, uint32_t width, float (&entries)[kEach]) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      entries[i] = mine + i * kStep < width ? ptx::to_float(some[i]) : number_of(kLeast);
    }
  }
};

// One row.
template <class T, bool kPieces>
struct Row {
  using Mine = Entries<T, kPieces>;
  static constexpr int kEach = Mine::kEach, kStep = Mine::kStep;
  static constexpr uint32_t kTogether = kThreads * kEach;
  const T* row;
  uint32_t width;

  // Hands every thread entries of its own, as often as any has some: body(entries, index of i).
  template <class Body>
  __device__ __forceinline__ void walk(const Body& body) const {
    uint32_t mine = threadIdx.x * (kPieces ? kEach : 1);
#pragma unroll 1
    for (uint32_t first = 0; first < width; first += kAtOnce * kTogether) {
      Mine some[kAtOnce];
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) some[a].load(row, mine + a * kTogether, width);
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a, mine += kTogether) {
        float entries[kEach];
        some[a].widen(mine, width, entries);
        body(entries, [mine](int i) { return mine + i * kStep; });
      }
    }
  }

  // What the row has k entries of at least; NaN where that may be all of them.
  __device__ float bound(int k) const {
    float largest[2] = {number_of(kLeast), number_of(kLeast)};
    walk([&](const float (&entries)[kEach], const auto&) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        float& so_far = largest[i / (kEach / 2)];
        so_far = fmaxf(so_far, entries[i]);  // not a NaN: a lower bound is one still
      }
    });
    // Bit by bit, the largest number that k of the maxima reach, up to its last 16 bits.
    const uint32_t orders[2] = {order_of(largest[0]) >> 16, order_of(largest[1]) >> 16};
    uint32_t reached = 0;
    for (uint32_t bit = 1u << 15; bit != 0; bit >>= 1) {
      const int count = __syncthreads_count(orders[0] >= (reached | bit)) +
                        __syncthreads_count(orders[1] >= (reached | bit));
      if (count >= k) reached |= bit;
    }
    return number_of(reached << 16);
  }

  // Puts the keys that are wanted where there is room, in any order, and counts all of them.
  template <class Wanted>
  __device__ int collect(Shared& shared, const Wanted& wanted) const {
    int& count = shared.found[0];
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    walk([&](const float (&entries)[kEach], const auto& index) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kEach; ++i) any |= wanted(entries[i], index(i));
      if (!any) return;
      for (int i = 0; i < kEach; ++i) {
        if (index(i) >= width || !wanted(entries[i], index(i))) continue;
        const int at = atomicAdd(&count, 1);
        if (at < kRoom) shared.keys[at] = key_of(entries[i], index(i));
      }
    });
    __syncthreads();
    return count;
  }

  // The k-th largest key.
  __device__ uint64_t select(Shared& shared, int k) const {
    uint64_t key = 0;
    int wanted = k;
    for (int shift = 56; shift >= 0; shift -= 8) {
      if (shift < 32 && (width - 1) >> shift == 0) {  // no index has these bits
        key |= uint64_t{kDigits - 1} << shift;
        continue;
      }
      if (threadIdx.x < kDigits) shared.counts[threadIdx.x] = 0;
      __syncthreads();
      walk([&](const float (&entries)[kEach], const auto& index) {
        for (int i = 0; i < kEach; ++i) {
          const uint64_t mine = key_of(entries[i], index(i));
          const bool among = index(i) < width && ((mine ^ key) >> shift) < kDigits;
          const int digit = among ? static_cast<int>(mine >> shift & (kDigits - 1)) : -1;
          // Equal ones would wait in a row.
          const unsigned same = __match_any_sync(kAllLanes, digit);
          if (among && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x) % kWarp) {
            atomicAdd(&shared.counts[digit], __popc(same));
          }
        }
      });
      __syncthreads();
      if (threadIdx.x < kDigits) {
        const int mine = shared.counts[threadIdx.x];
        int above = 0;
        for (int d = threadIdx.x + 1; d < kDigits; ++d) above += shared.counts[d];
        if (above < wanted && above + mine >= wanted) {
          shared.found[1] = static_cast<int>(threadIdx.x), shared.found[2] = wanted - above;
        }
      }
      __syncthreads();
      key |= static_cast<uint64_t>(shared.found[1]) << shift;
      wanted = shared.found[2];
    }
    return key;
  }
};

// Largest first, in place, by a bitonic network.
__device__ void sort(uint64_t* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int span = 2; span <= size; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (step - 1));
        const uint64_t a = keys[low], b = keys[low + step];
        if ((a < b) == ((low & span) == 0)) keys[low] = b, keys[low + step] = a;
      }
      __syncthreads();
    }
  }
}

template <class T, bool kPieces>
__global__ void __launch_bounds__(kThreads, 3) select_largest(const CudaSelection args) {
  Shared& shared = *shared_memory<Shared>();
  const auto k = static_cast<int>(args.k);
  const Row<T, kPieces> row{static_cast<const T*>(args.dense) + blockIdx.x * args.width,
                            static_cast<uint32_t>(args.width)};
  const float bound = row.bound(k);
  int count = row.collect(shared, [bound](float x, uint32_t) { return !(x < bound); });
  if (count > kRoom) {
    const uint64_t least = row.select(shared, k);
    count = row.collect(shared, [least](float x, uint32_t i) { return key_of(x, i) >= least; });
  }
  sort(shared.keys.data(), count);
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const uint32_t index = ~static_cast<uint32_t>(shared.keys[i]);
    const T value = row.row[index];
    const int64_t at = blockIdx.x * args.k + i;
    static_cast<T*>(args.values)[at] = args.relu && ptx::to_float(value) < 0 ? T{} : value;
    args.indices[at] = index;
  }
}

template <class T>
void launch_selection(const CudaSelection& args, cudaStream_t stream) {
  const bool pieces = reinterpret_cast<uintptr_t>(args.dense) % 16 == 0 &&
                      args.width % Entries<T, true>::kEach == 0;
  launch(pieces ? select_largest<T, true> : select_largest<T, false>,
         static_cast<unsigned>(args.rows), kThreads,
         std::max(sizeof(Shared), static_cast<size_t>(args.shared_bytes)), stream, args);
}

}  // namespace

void select_cuda(const CudaSelection& args, cudaStream_t stream) {
  if (args.rows == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: return launch_selection<float>(args, stream);
    case DType::kBFloat16: return launch_selection<BFloat16>(args, stream);
    case DType::kFloat16: return launch_selection<Float16>(args, stream);
    default: fail("topk: there is no kernel that selects among ", name(args.dtype));
  }
}

}  // namespace gossamer::actsparse::topk
