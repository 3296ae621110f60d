// A sample of a Hopper kernel, for the emulation's own tests, with faults that can be planted:
//
//   y[m, n] = sum over k of x[m, k] W[n, k]      x bfloat16 [M, K], W in Sparse24, y float32 [M, N]
//
// W is the sparse left operand of wgmma.sp. A block computes 64 x 64 of y in steps of 128 columns:
// warp 4 is the producer, one lane of which keeps three stages filled by TMA, and warps 0 to 3, a
// warpgroup, multiply. For each stage, `full` counts the bytes that arrive and `empty` the
// consumers that have let go. The result goes through shared memory, for TMA to write what lies
// inside y. K must be a multiple of 128.
#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels/exports.h"

namespace gossamer {
namespace {

enum Plant : int64_t {
  kNone,
  kNoFence,
  kNoCommit,
  kReadBeforeWait,
  kLetGoBeforeWait,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kTooManyBytes,
  kNoProxyFence,
  kUnwaitedStore,
  kMisplacedTile,
  kMissingWarp,
  kNoBarrierBeforeStore,
};

// The kernel is compiled twice: as it should be, and with a fault chosen at run time.
template <bool kPlanted>
struct Faults {
  Plant plant;
  __device__ bool has(Plant fault) const { return kPlanted && plant == fault; }
};

constexpr int kTile = 64;   // rows of W and rows of x
constexpr int kStep = 128;  // columns
constexpr int kHalf = 64;   // columns of x in a tile: 128 bytes, the span of the swizzle
constexpr int kStages = 3;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
// 64 rows of 128 bytes: half a step of x, or the 64 stored columns of a step of W.
constexpr int kTileElements = kTile * kHalf;
constexpr int kStageBytes = 3 * kTileElements * sizeof(BFloat16);
constexpr int kEightRows = 8 * 128;  // bytes

struct Shared {
  SharedTile<BFloat16, kTileElements, 1024> weights[kStages];
  SharedTile<BFloat16, kTileElements, 1024> inputs[kStages][2];
  SharedTile<float, kTile * kTile, 128> result;
  uint64_t full[kStages], empty[kStages];
};

struct Args {
  TensorMap x, values, y;
  const uint8_t* indices;
  int n, k;
};

template <bool kPlanted>
__device__ void produce(const Faults<kPlanted> faults, Shared& shared, const Args& args) {
  const int first_n = blockIdx.x * kTile, first_m = blockIdx.y * kTile;
  for (int step = 0; step < args.k / kStep; ++step) {
    const int stage = step % kStages, round = step / kStages;
    // The first round finds the stages empty: the phase before the first counts as ended.
    if (!faults.has(kNoWaitForEmpty)) ptx::mbarrier_wait(&shared.empty[stage], (round + 1) % 2);
    uint64_t* full = &shared.full[stage];
    ptx::mbarrier_arrive_expect_tx(full, kStageBytes + (faults.has(kTooManyBytes) ? 16 : 0));
    BFloat16* weights = shared.weights[stage].data() + (faults.has(kMisplacedTile) ? 64 : 0);
    ptx::tma_load_2d(weights, &args.values, full, step * kStep / 2, first_n);
    for (int half = 0; half < 2; ++half) {
      ptx::tma_load_2d(shared.inputs[stage][half].data(), &args.x, full,
                       step * kStep + half * kHalf, first_m);
    }
  }
}

template <bool kPlanted>
__device__ void consume(const Faults<kPlanted> faults, Shared& shared, const Args& args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_n = blockIdx.x * kTile, first_m = blockIdx.y * kTile;
  // Rows past N read the last row's indices: zeros would not be legal metadata.
  const int n = first_n + 16 * warp + g;
  const uint8_t* low = args.indices + int64_t{min(n, args.n - 1)} * (args.k / 8);
  const uint8_t* high = args.indices + int64_t{min(n + 8, args.n - 1)} * (args.k / 8);

  float sum[kTile / 2] = {};
  for (int step = 0; step < args.k / kStep; ++step) {
    const int stage = step % kStages, round = step / kStages;
    uint32_t metadata[2];  // one word serves two products, by the selector
    for (int i = 0; i < 2; ++i) {
      const int at = step * kStep / 8 + 8 * i + t / 2 * 4;
      metadata[i] =
          __byte_perm(*reinterpret_cast<const uint32_t*>(low + at),
                      *reinterpret_cast<const uint32_t*>(high + at), t % 2 == 0 ? 0x5410 : 0x7632);
    }
    if (!faults.has(kNoWaitForFull)) ptx::mbarrier_wait(&shared.full[stage], round % 2);
    if (!faults.has(kNoFence)) ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 32 columns each: 16 stored ones of W
      if (faults.has(kMissingWarp) && i == 3 && warp == 2) continue;
      const uint64_t w = ptx::matrix_descriptor(shared.weights[stage].data() + 16 * i,
                                                Swizzle::k128, 16, kEightRows);
      const uint64_t x = ptx::matrix_descriptor(shared.inputs[stage][i / 2].data() + i % 2 * 32,
                                                Swizzle::k128, 16, kEightRows);
      if (i % 2 == 0) {
        ptx::wgmma_sp<BFloat16, kTile, 0>(sum, w, x, metadata[i / 2], true);
      } else {
        ptx::wgmma_sp<BFloat16, kTile, 1>(sum, w, x, metadata[i / 2], true);
      }
    }
    if (!faults.has(kNoCommit)) ptx::wgmma_commit();
    if (faults.has(kLetGoBeforeWait)) ptx::mbarrier_arrive(&shared.empty[stage]);
    if (faults.has(kReadBeforeWait)) sum[0] += 1.0f;
    ptx::wgmma_wait<0>();
    if (!faults.has(kLetGoBeforeWait)) ptx::mbarrier_arrive(&shared.empty[stage]);
  }

  // Register 4j + r of D: row g + 8 (r / 2) of this warp's 16, column 8j + 2t + r mod 2.
  float* result = shared.result.data();
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int column = i / 4 * 8 + t * 2 + i % 2;
    result[column * kTile + 16 * warp + g + i % 4 / 2 * 8] = sum[i];
  }
  if (!faults.has(kNoProxyFence)) ptx::fence_proxy_async();
  if (!faults.has(kNoBarrierBeforeStore)) ptx::barrier_sync(1, kConsumers);
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&args.y, result, first_n, first_m);
    ptx::tma_store_commit();
    if (!faults.has(kUnwaitedStore)) ptx::tma_store_wait<0>();
  }
}

template <bool kPlanted>
__global__ void __launch_bounds__(kThreads)
    sparse24_gemm(const Faults<kPlanted> faults, const __grid_constant__ Args args) {
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    consume(faults, shared, args);
  } else if (ptx::elect_one()) {
    produce(faults, shared, args);
  }
}

template <bool kPlanted>
void run(Plant plant, const Args& args, int m) {
  const dim3 grid((args.n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  launch(sparse24_gemm<kPlanted>, grid, kThreads, sizeof(Shared), nullptr, Faults<kPlanted>{plant},
         args);
}

TensorMap matrix_map(const void* data, int element_bytes, int64_t rows, int64_t columns,
                     int box_columns, Swizzle swizzle) {
  const int64_t extents[] = {columns, rows}, pitch[] = {columns * element_bytes};
  const int box[] = {box_columns, kTile};
  return tensor_map(data, element_bytes, 2, extents, pitch, box, swizzle);
}

}  // namespace
}  // namespace gossamer

GOSSAMER_EXPORT int sparse24_gemm(float* y, const void* x, const void* values,
                                  const uint8_t* indices, int64_t m, int64_t n, int64_t k,
                                  int64_t plant, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    const Args args{matrix_map(x, 2, m, k, kHalf, Swizzle::k128),
                    matrix_map(values, 2, n, k / 2, kHalf, Swizzle::k128),
                    matrix_map(y, 4, m, n, kTile, Swizzle::kNone),
                    indices,
                    static_cast<int>(n),
                    static_cast<int>(k)};
    const int rows = static_cast<int>(m);
    plant == kNone ? run<false>(kNone, args, rows)
                   : run<true>(static_cast<Plant>(plant), args, rows);
  });
}
