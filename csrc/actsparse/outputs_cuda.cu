// The wanted outputs of a linear layer, for few tokens:
//
//   y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]) where (m, n) is wanted, else 0,   W [N, K]
//
// A block has a range of outputs, lists those that any token of its tile (1 or 4) wants, and each
// warp takes every eighth of them: a row of W, 16 bytes a lane and step, times x, which comes from
// the L1 after the first row. Rows nobody wants are not read; what a token does not want is 0,
// whatever the row holds. A warp has 8 (4 tokens: 4) steps of 512 bytes on their way, 16 warps of a
// multiprocessor 64 (32) KB, as linear_cuda.cu explains. Sums take one order: the same bits in
// every run, and for a token in any company.
#include "actsparse/linear_cuda.h"
#include "common/activation.cuh"
#include "common/check.h"
#include "common/run.cuh"
#include "common/warp.cuh"

namespace gossamer::actsparse {
namespace {

struct Args {
  int64_t m, n, k;
  const char* x;
  int64_t x_stride;  // bytes
  const char* weight;
  int64_t weight_stride;  // bytes
  const void* bias;
  const uint8_t* wanted;
  void* out;
  int64_t depth;  // outputs of a block
  int token_tiles;
  Activation activation;
};

struct Shared {
  SharedTile<uint32_t, kLinearThreads> entries;  // output of the round | tokens << 16
  SharedTile<int, kLinearWarps> counts;
};

// 16 bytes of a row, as floats; or as many elements, 32 apart, of memory of any alignment.
template <class T, bool kAligned>
struct Piece {
  static constexpr int kElements = 16 / sizeof(T);
  Run<T, kElements> run;

  __device__ __forceinline__ void load_weights(const char* row, int64_t step, int64_t k) {
    if constexpr (kAligned) {
      const int64_t at =
          min((step * kWarp + threadIdx.x % kWarp) * 16, k * int64_t{sizeof(T)} - 16);
      const uint4 bytes = ptx::load_nc16_hint(row + at, ptx::l2_evict_first());
      // Past the end the zeros of x must not meet an infinity.
      const bool inside = (step * kWarp + threadIdx.x % kWarp) * kElements < k;
      run = inside ? *reinterpret_cast<const Run<T, kElements>*>(&bytes) : Run<T, kElements>{};
    } else {
      load_x(row, step, k);
    }
  }
  // Zeros past the end.
  __device__ __forceinline__ void load_x(const char* row, int64_t step, int64_t k) {
    const T* from = reinterpret_cast<const T*>(row);
    const int lane = threadIdx.x % kWarp;
    if constexpr (kAligned) {
      const int64_t at = (step * kWarp + lane) * kElements;
      run = at < k ? *reinterpret_cast<const Run<T, kElements>*>(from + at) : Run<T, kElements>{};
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int64_t at = (step * kElements + i) * kWarp + lane;
        run.at[i] = at < k ? from[at] : T{};
      }
    }
  }
};

template <class T, int TM, bool kAligned>
__global__ void __launch_bounds__(kLinearThreads, kLinearResident) outputs_kernel(const Args args) {
  using P = Piece<T, kAligned>;
  constexpr int kSlots = !kAligned ? 1 : TM == 1 ? 8 : 4;
  Shared& shared = *shared_memory<Shared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto block = static_cast<int64_t>(blockIdx.x);
  const int64_t first_token = block % args.token_tiles * TM;
  const int tokens = static_cast<int>(min(args.m - first_token, int64_t{TM}));
  const int64_t begin = block / args.token_tiles * args.depth;
  const int64_t end = min(begin + args.depth, args.n);
  const int64_t steps = (args.k + P::kElements * kWarp - 1) / (P::kElements * kWarp);
  const char* x = args.x + first_token * args.x_stride;

  for (int64_t first = begin; first < end; first += kLinearThreads) {
    if (first > begin) __syncthreads();  // all have read the list that goes
    // Each thread looks at one output, and writes the zeros of it.
    const int64_t mine = first + threadIdx.x;
    uint32_t has = 0;
    if (mine < end) {
#pragma unroll
      for (int t = 0; t < TM; ++t) {
        if (t >= tokens) continue;
        const int64_t at = (first_token + t) * args.n + mine;
        if (args.wanted[at] != 0) {
          has |= 1u << t;
        } else {
          static_cast<T*>(args.out)[at] = T{};
        }
      }
    }
    const unsigned votes = __ballot_sync(kAllLanes, has != 0);
    if (lane == 0) shared.counts[warp] = __popc(votes);
    __syncthreads();
    int count = 0, place = __popc(votes & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kLinearWarps; ++w) {
      if (w < warp) place += shared.counts[w];
      count += shared.counts[w];
    }
    if (has != 0) shared.entries[place] = threadIdx.x | has << 16;
    __syncthreads();

    for (int entry = warp; entry < count; entry += kLinearWarps) {
      const uint32_t found = shared.entries[entry];
      const int64_t n = first + (found & 0xffff);
      const char* row = args.weight + n * args.weight_stride;
      float sum[TM] = {};
#pragma unroll 1
      for (int64_t step = 0; step < steps; step += kSlots) {
        P weights[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i)
          weights[i].load_weights(row, min(step + i, steps - 1), args.k);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          if (step + i >= steps) break;
#pragma unroll
          for (int t = 0; t < TM; ++t) {
            if (t >= tokens) break;
            P values;
            values.load_x(x + t * args.x_stride, step + i, args.k);
#pragma unroll
            for (int j = 0; j < P::kElements; ++j) {
              sum[t] = fmaf(ptx::to_float(values.run.at[j]), ptx::to_float(weights[i].run.at[j]),
                            sum[t]);
            }
          }
        }
      }
      float total = 0.0f;  // lane t's, of token t
#pragma unroll
      for (int t = 0; t < TM; ++t) {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
          sum[t] += __shfl_xor_sync(kAllLanes, sum[t], step);
        }
        if (lane == t) total = sum[t];
      }
      if (lane < TM && (found >> (16 + lane) & 1) != 0) {
        if (args.bias != nullptr) total += ptx::to_float(static_cast<const T*>(args.bias)[n]);
        static_cast<T*>(args.out)[(first_token + lane) * args.n + n] =
            ptx::from_float<T>(activate(total, args.activation));
      }
    }
  }
}

template <class T, int TM, bool kAligned>
void launch_outputs(const CudaOutputsArgs& given, cudaStream_t stream) {
  const int64_t size = sizeof(T), tiles = ceil_div(given.m, TM);
  // About as many blocks as run at once, each of at least an output a warp.
  const int64_t depth = std::max<int64_t>(ceil_div(given.n * tiles, given.blocks), kLinearWarps);
  const Args args{given.m,
                  given.n,
                  given.k,
                  static_cast<const char*>(given.x),
                  given.x_stride * size,
                  static_cast<const char*>(given.weight),
                  given.weight_stride * size,
                  given.bias,
                  given.wanted,
                  given.out,
                  depth,
                  static_cast<int>(tiles),
                  given.activation};
  const auto grid = static_cast<unsigned>(ceil_div(given.n, depth) * tiles);
  launch(outputs_kernel<T, TM, kAligned>, grid, kLinearThreads, sizeof(Shared), stream, args);
}

template <class T>
void launch_of(const CudaOutputsArgs& args, cudaStream_t stream) {
  if (!are_aligned_outputs(args)) return launch_outputs<T, 1, false>(args, stream);
  args.m == 1 ? launch_outputs<T, 1, true>(args, stream) : launch_outputs<T, 4, true>(args, stream);
}

}  // namespace

void outputs_cuda(const CudaOutputsArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return;
  switch (args.dtype) {
    case DType::kFloat32: return launch_of<float>(args, stream);
    case DType::kBFloat16: return launch_of<BFloat16>(args, stream);
    case DType::kFloat16: return launch_of<Float16>(args, stream);
    default: fail("actsparse_outputs: there is no kernel for ", name(args.dtype));
  }
}

}  // namespace gossamer::actsparse
