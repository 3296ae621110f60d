// A sample of a kernel with clusters of blocks, for the emulation's own tests, with faults that can
// be planted:
//
//   y[b, r, c] = sum over s of w[b, s] x[r, 32 s + c]      32 x 32 int32 for each block b
//
// The blocks of a cluster share the tiles of x: each brings an equal part of the rows and
// multicasts it to all. `full` counts the bytes of all parts, `empty` the warps of all blocks that
// let go.
#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels/exports.h"

namespace gossamer {
namespace {

enum Plant : int64_t {
  kNone,
  kNoSyncAtBegin,
  kNoSyncAtEnd,
  kNoReleaseOfPeers,
  kReleaseBeforeRead,
  kNoWaitForFull,
  kPartOfTheBytes,
  kTooManyBytes,
  kReleaseTwice,
  kMulticastPastCluster,
  kReleasePastCluster,
};

template <bool kPlanted>
struct Faults {
  Plant plant;
  __device__ bool has(Plant fault) const { return kPlanted && plant == fault; }
};

constexpr int kTile = 32;  // rows and columns
constexpr int kStages = 3;
constexpr int kConsumers = 2;  // warps
constexpr int kThreads = (kConsumers + 1) * 32;

struct Shared {
  SharedTile<int32_t, kTile * kTile, 128> x[kStages];
  uint64_t full[kStages], empty[kStages];
};

struct Args {
  TensorMap x;
  const int32_t* w;
  int32_t* y;
  int steps;
};

template <int kBlocks, bool kPlanted>
__device__ void produce(const Faults<kPlanted> faults, Shared& shared, const Args& args) {
  constexpr int kRows = kTile / kBlocks, kBytes = kTile * kTile * sizeof(int32_t);
  const int first_row = ptx::cluster_rank() * kRows;
  const int bytes = faults.has(kPartOfTheBytes) ? kBytes / 2
                    : faults.has(kTooManyBytes) ? kBytes + 16
                                                : kBytes;
  const int blocks = faults.has(kMulticastPastCluster) ? 2 << kBlocks : (1 << kBlocks) - 1;
  for (int step = 0; step < args.steps; ++step) {
    const int stage = step % kStages, round = step / kStages;
    ptx::mbarrier_wait(&shared.empty[stage], (round + 1) % 2);
    ptx::mbarrier_arrive_expect_tx(&shared.full[stage], bytes);
    ptx::tma_load_2d_multicast(shared.x[stage].data() + first_row * kTile, &args.x,
                               &shared.full[stage], step * kTile, first_row,
                               static_cast<uint16_t>(blocks));
  }
}

template <int kBlocks, bool kPlanted>
__device__ void consume(const Faults<kPlanted> faults, Shared& shared, const Args& args) {
  constexpr int kRows = kTile / kConsumers;  // of a warp
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kRows;
  const auto release = [&](int stage) {
    __syncwarp();
    const bool own_only = faults.has(kNoReleaseOfPeers);
    const int past = faults.has(kReleasePastCluster) ? 1 : 0;
    if (lane >= (own_only ? 1 : kBlocks)) return;
    ptx::mbarrier_arrive_remote(&shared.empty[stage], own_only ? ptx::cluster_rank() : lane + past);
  };
  int32_t sum[kRows] = {};
  for (int step = 0; step < args.steps; ++step) {
    const int stage = step % kStages, round = step / kStages;
    const int32_t w = args.w[blockIdx.x * args.steps + step];
    if (!faults.has(kNoWaitForFull)) ptx::mbarrier_wait(&shared.full[stage], round % 2);
    if (faults.has(kReleaseBeforeRead)) release(stage);
    for (int i = 0; i < kRows; ++i) sum[i] += w * shared.x[stage][(first_row + i) * kTile + lane];
    if (!faults.has(kReleaseBeforeRead)) release(stage);
    if (faults.has(kReleaseTwice)) release(stage);
  }
  int32_t* y = args.y + (blockIdx.x * kTile + first_row) * kTile + lane;
  for (int i = 0; i < kRows; ++i) y[i * kTile] = sum[i];
}

template <int kBlocks, bool kPlanted>
__global__ void __launch_bounds__(kThreads)
    cluster_sums(const Faults<kPlanted> faults, const __grid_constant__ Args args) {
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    const int blocks = faults.has(kNoReleaseOfPeers) ? 1 : kBlocks;
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumers * blocks);
    }
    ptx::fence_mbarrier_init();
  }
  faults.has(kNoSyncAtBegin) ? __syncthreads() : ptx::cluster_sync();
  if (threadIdx.x < kConsumers * 32) {
    consume<kBlocks>(faults, shared, args);
  } else if (ptx::elect_one()) {
    produce<kBlocks>(faults, shared, args);
  }
  if (!faults.has(kNoSyncAtEnd)) ptx::cluster_sync();  // peers may write and arrive here until now
}

template <int kBlocks>
void run(Plant plant, const Args& args, int blocks) {
  const auto start = [&](auto kernel, auto faults) {
    launch_cluster(kBlocks, kernel, blocks, kThreads, sizeof(Shared), nullptr, faults, args);
  };
  plant == kNone ? start(cluster_sums<kBlocks, false>, Faults<false>{})
                 : start(cluster_sums<kBlocks, true>, Faults<true>{plant});
}

// ---- meetings of the cluster --------------------------------------------------------------------

// Each block of a cluster of four adds 1 + its rank to the cluster's count; y[block, phase] is the
// count when all have done so. The second warp has returned by then: it is not waited for.
__global__ void met_in_turn(int32_t* counts, int32_t* y, int phases) {
  if (threadIdx.x >= 32) return;
  int32_t* count = counts + blockIdx.x / 4;
  for (int phase = 0; phase < phases; ++phase) {
    if (threadIdx.x == 0) atomicAdd(count, 1 + ptx::cluster_rank());
    ptx::cluster_sync();
    if (threadIdx.x == 0) y[blockIdx.x * phases + phase] = atomicAdd(count, 0);
    ptx::cluster_sync();
  }
}

// Block 1 waits for an arrival that does not come, block 0 for block 1.
__global__ void never_met() {
  uint64_t* barrier = shared_memory<uint64_t>();
  ptx::mbarrier_init(barrier, 1);
  if (ptx::cluster_rank() == 1) ptx::mbarrier_wait(barrier, 0);
  ptx::cluster_sync();
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

GOSSAMER_EXPORT int cluster_sums(int32_t* y, const int32_t* x, const int32_t* w, int64_t cluster,
                                 int64_t blocks, int64_t steps, int64_t plant, char* text,
                                 int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const int64_t extents[] = {steps * kTile, kTile}, pitch[] = {steps * kTile * 4};
    const int box[] = {kTile, kTile / static_cast<int>(cluster)};
    const Args args{tensor_map(x, 4, 2, extents, pitch, box, Swizzle::kNone), w, y,
                    static_cast<int>(steps)};
    const auto fault = static_cast<Plant>(plant);
    const int count = static_cast<int>(blocks);
    if (cluster == 1) run<1>(fault, args, count);
    if (cluster == 2) run<2>(fault, args, count);
    if (cluster == 4) run<4>(fault, args, count);
  });
}
GOSSAMER_EXPORT int met_in_turn(int32_t* counts, int32_t* y, int64_t blocks, int64_t phases,
                                char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    launch_cluster(4, met_in_turn, static_cast<unsigned>(blocks), 64, 0, nullptr, counts, y,
                   static_cast<int>(phases));
  });
}
GOSSAMER_EXPORT int never_met(char* text, int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch_cluster(2, never_met, 2, 1, sizeof(uint64_t), nullptr); });
}
