// A sample of the portable kind of kernel, for the emulation's own tests, together with copies of
// it that have one fault each:
//
//   y[m, n] = sum over k of x[m, k] W[n, k]      x bfloat16 [M, K], W in Sparse24, y float32 [M, N]
//
// W is the sparse left operand of mma.sp, 16 rows of it against 8 rows of x. A block computes 64 x
// 64 of y in steps of 64 columns, 4 warps of 32 x 32 each:
//
//              x rows  0 ..... 31  32 .... 63
//   W rows  0 .. 31  [   warp 0  |   warp 2  ]
//   W rows 32 .. 63  [   warp 1  |   warp 3  ]
//
// Two stages of shared memory: one is multiplied while cp.async fills the other. K must be a
// multiple of 64; rows past M or N are read as zeros and not written.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "kernels/exports.h"

namespace gossamer {
namespace {

enum Plant : int64_t {
  kNone,
  kNoBarrierAfterWait,
  kNoBarrierAtLoopEnd,
  kNoCommit,
  kLaxWait,
  kReadBeforeWait,
  kDivergentWarp,
  kSkippedBarrier,
  kIllegalMetadata,
  kMisalignedMatrix,
  kUnwaitedCopy,
  kMatrixPastTile,
  kSharedReadPastTile,
  kSharedWritePastTile,
  kCopyPastTensor,
  kGlobalReadPastTensor,
  kEarlyReturn,
  kPartialWarp,
  kNarrowMask,
};

// The kernel is compiled twice: as it should be, and with a fault chosen at run time.
template <bool kPlanted>
struct Faults {
  Plant plant;
  __device__ bool has(Plant fault) const { return kPlanted && plant == fault; }
};

constexpr int kTile = 64;  // rows of W, rows of x and columns of a step
constexpr int kStages = 2;
constexpr int kThreads = 128;
// Rows are padded by 16 bytes: the eight rows that ldmatrix reads together then lie in different
// banks.
constexpr int kWeightRow = kTile / 2 + 8;
constexpr int kInputRow = kTile + 8;
constexpr int kIndexRow = kTile / 8;  // bytes: a nibble for every four columns

struct Shared {
  SharedTile<BFloat16, kStages * kTile * kWeightRow> weights;
  SharedTile<BFloat16, kStages * kTile * kInputRow> inputs;
  SharedTile<uint8_t, kStages * kTile * kIndexRow> indices;
};

struct Args {
  float* y;
  const BFloat16 *x, *values;
  const uint8_t* indices;
  int m, n, k;
};

template <bool kPlanted>
__device__ void load_step(const Faults<kPlanted> faults, Shared& shared, const Args& args,
                          int step) {
  const int stage = step % kStages;
  const int first_n = blockIdx.x * kTile, first_m = blockIdx.y * kTile;
  for (int i = threadIdx.x; i < kTile * kTile / 2 / 8; i += kThreads) {
    const int row = i / 4, column = i % 4 * 8, n = first_n + row;
    const BFloat16* from = args.values + int64_t{min(n, args.n - 1)} * (args.k / 2);
    ptx::cp_async16(shared.weights.data() + (stage * kTile + row) * kWeightRow + column,
                    from + step * kTile / 2 + column, n < args.n ? 16 : 0);
  }
  for (int i = threadIdx.x; i < kTile * kTile / 8; i += kThreads) {
    const int row = i / 8, column = i % 8 * 8, m = first_m + row;
    const bool inside = faults.has(kCopyPastTensor) || m < args.m;
    const BFloat16* from =
        args.x + int64_t{faults.has(kCopyPastTensor) ? m : min(m, args.m - 1)} * args.k;
    ptx::cp_async16(shared.inputs.data() + (stage * kTile + row) * kInputRow + column,
                    from + step * kTile + column, inside ? 16 : 0);
  }
  // Rows past N read the last row's indices: zeros would not be legal metadata.
  for (int row = threadIdx.x; row < kTile; row += kThreads) {
    const uint8_t* from = args.indices + int64_t{min(first_n + row, args.n - 1)} * (args.k / 8);
    ptx::cp_async8(shared.indices.data() + (stage * kTile + row) * kIndexRow,
                   from + step * kIndexRow);
  }
}

template <bool kPlanted>
__device__ void multiply_step(const Faults<kPlanted> faults, Shared& shared, int stage,
                              float (&sum)[2][4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_n = warp % 2 * 32, first_m = warp / 2 * 32;
  const BFloat16* weights = shared.weights.data() + stage * kTile * kWeightRow;
  const BFloat16* inputs = shared.inputs.data() + stage * kTile * kInputRow;
  const uint8_t* indices = shared.indices.data() + stage * kTile * kIndexRow;

  uint32_t w[2][2][4], metadata[2];  // 32 rows of W; [..][2]: columns 0-31 and 32-63 of the step
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_n + 16 * i;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int past = faults.has(kMatrixPastTile) ? kTile : 0;  // at the last stage
      const BFloat16* matrix = weights + (row + lane % 16 + past) * kWeightRow + 16 * half;
      ptx::ldmatrix(w[i][half], matrix + lane / 16 * 8 + (faults.has(kMisalignedMatrix) ? 1 : 0));
    }
    // Lanes 4g + t, t = 0 and 1, hold the words of columns 0-31, t = 2 and 3 those of 32-63: one
    // register serves both halves, by the selector.
    const int g = lane / 4, t = lane % 4;
    const auto* low = reinterpret_cast<const uint32_t*>(indices + (row + g) * kIndexRow);
    const auto* high = reinterpret_cast<const uint32_t*>(indices + (row + g + 8) * kIndexRow);
    metadata[i] = __byte_perm(low[t / 2], high[t / 2], t % 2 == 0 ? 0x5410 : 0x7632);
    if (faults.has(kIllegalMetadata) && lane == 5) metadata[i] &= ~0xf0u;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[4];
      ptx::ldmatrix(x,
                    inputs + (first_m + 8 * j + lane % 8) * kInputRow + 32 * half + lane / 8 * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (half == 0) {
          ptx::mma_sp_m16n8k32<BFloat16, 0>(sum[i][j], w[i][0], x, metadata[i]);
        } else {
          ptx::mma_sp_m16n8k32<BFloat16, 1>(sum[i][j], w[i][1], x, metadata[i]);
        }
      }
    }
  }
  if (faults.has(kSharedReadPastTile) && threadIdx.x == 0) {
    sum[0][0][0] += static_cast<float>(indices[kStages * kTile * kIndexRow]);
  }
}

// Writes past a tile, and warp operations that not all lanes execute.
template <bool kPlanted>
__device__ void misbehave(const Faults<kPlanted> faults, Shared& shared, const Args& args) {
  const int lane = threadIdx.x % 32;
  float one = 1.0f;
  if (faults.has(kSharedWritePastTile) && threadIdx.x == 0) {
    shared.indices.data()[kStages * kTile * kIndexRow + 3] = 7;
  }
  if (faults.has(kDivergentWarp)) {
    if (lane < 16) {
      one += static_cast<float>(__ballot_sync(0xffffffffu, 1));
    } else {
      one += __shfl_xor_sync(0xffffffffu, one, 1);
    }
  }
  if (faults.has(kNarrowMask) && lane < 8) one += __shfl_sync(0x00ffu, one, 9);
  if (faults.has(kGlobalReadPastTensor) && threadIdx.x == 0) {
    one += ptx::to_float(args.x[int64_t{args.m} * args.k]);
  }
  if (faults.has(kUnwaitedCopy)) {
    ptx::cp_async4(shared.indices.data() + 4 * threadIdx.x, args.indices);
    ptx::cp_async_commit();
  }
  if (one < 0.0f) args.y[0] = one;
}

template <bool kPlanted>
__global__ void __launch_bounds__(kThreads)
    sparse24_gemm(const Faults<kPlanted> faults, const Args args) {
  Shared& shared = *shared_memory<Shared>();
  float sum[2][4][4] = {};
  const int steps = args.k / kTile;
  if (faults.has(kEarlyReturn) && threadIdx.x >= 96) return;

  load_step(faults, shared, args, 0);
  ptx::cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load_step(faults, shared, args, step + 1);
    if (!faults.has(kNoCommit)) ptx::cp_async_commit();  // also an empty group: waits count groups
    if (faults.has(kReadBeforeWait)) multiply_step(faults, shared, step % kStages, sum);
    if (faults.has(kLaxWait)) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (!faults.has(kNoBarrierAfterWait) &&
        (!faults.has(kSkippedBarrier) || threadIdx.x / 32 != 1)) {
      __syncthreads();
    }
    if (!faults.has(kReadBeforeWait)) multiply_step(faults, shared, step % kStages, sum);
    if (!faults.has(kNoBarrierAtLoopEnd)) __syncthreads();  // before the next load overwrites it
  }
  ptx::cp_async_wait<0>();
  misbehave(faults, shared, args);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int n = blockIdx.x * kTile + warp % 2 * 32 + 16 * i + lane / 4 + r / 2 * 8;
        const int m = blockIdx.y * kTile + warp / 2 * 32 + 8 * j + lane % 4 * 2 + r % 2;
        if (n < args.n && m < args.m) args.y[int64_t{m} * args.n + n] = sum[i][j][r];
      }
    }
  }
}

template <bool kPlanted>
void run(Plant plant, const Args& args) {
  const Faults<kPlanted> faults{plant};
  const dim3 grid((args.n + kTile - 1) / kTile, (args.m + kTile - 1) / kTile);
  const int threads = plant == kPartialWarp ? kThreads - 16 : kThreads;
  launch(sparse24_gemm<kPlanted>, grid, threads, sizeof(Shared), nullptr, faults, args);
}

}  // namespace
}  // namespace gossamer

GOSSAMER_EXPORT int sparse24_gemm(float* y, const void* x, const void* values,
                                  const uint8_t* indices, int64_t m, int64_t n, int64_t k,
                                  int64_t plant, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    const Args args{y,
                    static_cast<const BFloat16*>(x),
                    static_cast<const BFloat16*>(values),
                    indices,
                    static_cast<int>(m),
                    static_cast<int>(n),
                    static_cast<int>(k)};
    plant == kNone ? run<false>(kNone, args) : run<true>(static_cast<Plant>(plant), args);
  });
}
