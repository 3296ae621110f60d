// Kernels that do one thing each, so that a test can compare every wrapper in common/ptx.cuh with
// its definition. Registers of a warp cross as [32 lanes][registers] of 32 bits. For nvcc: sm_89 or
// newer.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "kernels/exports.h"

namespace gossamer {
namespace {

// ---- fragments ----------------------------------------------------------------------------------

__device__ int lane() { return threadIdx.x % 32; }

template <int N>
__device__ void load_registers(uint32_t (&r)[N], const uint32_t* from) {
  for (int i = 0; i < N; ++i) r[i] = from[lane() * N + i];
}
template <int N, class T>
__device__ void store_registers(T* to, const T (&r)[N]) {
  for (int i = 0; i < N; ++i) to[lane() * N + i] = r[i];
}

// Lane l's row is at `offsets[l]` bytes of `bytes`.
template <int Matrices, bool Transposed>
__global__ void load_matrices(uint32_t* out, const uint8_t* bytes, const int* offsets, int count) {
  uint8_t* shared = shared_memory<uint8_t>();
  for (int i = threadIdx.x; i < count; i += 32) shared[i] = bytes[i];
  __syncwarp();
  uint32_t r[Matrices];
  if constexpr (Transposed) {
    ptx::ldmatrix_trans(r, shared + offsets[lane()]);
  } else {
    ptx::ldmatrix(r, shared + offsets[lane()]);
  }
  store_registers(out, r);
}

enum class Mma : int64_t {
  kF16,
  kBF16,
  kTF32,
  kS8,
  kE4M3,
  kSparseF16,
  kSparseBF16,
  kSparseS8,
  kSparseE4M3,
};

template <Mma kMma, int Selector>
__global__ void one_mma(void* d, const uint32_t* a, const uint32_t* b, const uint32_t* metadata) {
  constexpr bool kInteger = kMma == Mma::kS8 || kMma == Mma::kSparseS8;
  constexpr bool kSparse = kMma >= Mma::kSparseF16;
  using D = std::conditional_t<kInteger, int32_t, float>;
  D sum[4];
  uint32_t left[4], right[kSparse ? 4 : 2];
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<D*>(d)[lane() * 4 + i];
  load_registers(left, a);
  load_registers(right, b);
  if constexpr (kMma == Mma::kF16) ptx::mma_m16n8k16<Float16>(sum, left, right);
  if constexpr (kMma == Mma::kBF16) ptx::mma_m16n8k16<BFloat16>(sum, left, right);
  if constexpr (kMma == Mma::kTF32) ptx::mma_m16n8k8_tf32(sum, left, right);
  if constexpr (kMma == Mma::kS8) ptx::mma_m16n8k32<int8_t>(sum, left, right);
  const uint32_t e = kSparse ? metadata[lane()] : 0;
  if constexpr (kMma == Mma::kSparseF16) {
    ptx::mma_sp_m16n8k32<Float16, Selector>(sum, left, right, e);
  } else if constexpr (kMma == Mma::kSparseBF16) {
    ptx::mma_sp_m16n8k32<BFloat16, Selector>(sum, left, right, e);
  } else if constexpr (kMma == Mma::kSparseS8) {
    ptx::mma_sp_m16n8k64<int8_t>(sum, left, right, e);
  }
  if constexpr (kMma == Mma::kE4M3) ptx::mma_m16n8k32<E4M3>(sum, left, right);
  if constexpr (kMma == Mma::kSparseE4M3) ptx::mma_sp_m16n8k64<E4M3>(sum, left, right, e);
  store_registers(static_cast<D*>(d), sum);
}

// ---- conversions --------------------------------------------------------------------------------

template <class T>
__global__ void round_trip(T* rounded, float* back, const float* x, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    rounded[i] = ptx::from_float<T>(x[i]);
    if constexpr (!std::is_same_v<T, int8_t>) back[i] = ptx::to_float(rounded[i]);
  }
}
template <class T>
__global__ void packed_pairs(uint32_t* packed, float2* back, const float2* x, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    packed[i] = ptx::pack<T>(x[i].x, x[i].y);
    back[i] = ptx::unpack<T>(packed[i]);
  }
}
template <class T>
__global__ void packed_fma(uint32_t* out, const uint32_t* abc, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = ptx::fma2<T>(abc[3 * i], abc[3 * i + 1], abc[3 * i + 2]);
  }
}
// Two functions that treat their operands differently.
__global__ void bitwise(uint32_t* out, const uint32_t* abc, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t a = abc[3 * i], b = abc[3 * i + 1], c = abc[3 * i + 2];
    out[2 * i] = ptx::lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c);
    out[2 * i + 1] = ptx::lop3<(0xf0 & ~0xcc & 0xff) ^ 0xaa>(a, b, c);
  }
}
__global__ void packed_quads(uint32_t* packed, const float4* x, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    packed[i] = ptx::pack_e4m3(x[i].x, x[i].y, x[i].z, x[i].w);
  }
}
__global__ void rounded_tf32(uint32_t* rounded, const float* x, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) rounded[i] = ptx::to_tf32(x[i]);
}

// ---- copies -------------------------------------------------------------------------------------

// Thread i copies `Bytes` of which valid[i] count, into memory that was full of ones before.
template <int Bytes>
__global__ void copies(uint8_t* out, const uint8_t* in, const int* valid) {
  uint8_t* shared = shared_memory<uint8_t>();
  for (int i = threadIdx.x; i < Bytes * 32; i += 32) shared[i] = 0xff;
  __syncwarp();
  uint8_t* to = shared + lane() * Bytes;
  const uint8_t* from = in + lane() * Bytes;
  if constexpr (Bytes == 16) {
    if (lane() % 2 == 0) {
      ptx::cp_async16(to, from, valid[lane()]);
    } else {
      ptx::cp_async16_hint(to, from, valid[lane()], ptx::l2_evict_first());
    }
  } else if constexpr (Bytes == 8) {
    ptx::cp_async8(to, from, valid[lane()]);
  } else {
    ptx::cp_async4(to, from, valid[lane()]);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = threadIdx.x; i < Bytes * 32; i += 32) out[i] = shared[i];
}
__global__ void wide_copies(uint8_t* out, const uint8_t* in) {
  ptx::store16(out + 16 * lane(), ptx::load_nc16(in + 16 * lane()));
  out += 512, in += 512;
  ptx::store16_stream(out + 16 * lane(),
                      ptx::load_nc16_hint(in + 16 * lane(), ptx::l2_evict_last()));
}

// ---- operations of a warp, each with a row of `out` ---------------------------------------------

__global__ void shuffles(int* out, const int* in, int width, int by) {
  const int value = in[lane()];
  out[lane()] = __shfl_sync(0xffffffffu, value, by, width);
  out[32 + lane()] = __shfl_xor_sync(0xffffffffu, value, by, width);
  out[64 + lane()] = __shfl_up_sync(0xffffffffu, value, by, width);
  out[96 + lane()] = __shfl_down_sync(0xffffffffu, value, by, width);
}
// The lanes of `mask` and the others, each among themselves.
__global__ void votes(unsigned* out, const int* in, unsigned mask) {
  const int value = in[lane()];
  const auto vote = [&](unsigned mine) {
    out[lane()] = __ballot_sync(mine, value & 1);
    out[32 + lane()] = __any_sync(mine, value & 1);
    out[64 + lane()] = __all_sync(mine, value & 1);
    out[96 + lane()] = __match_any_sync(mine, value & 3);
    out[128 + lane()] = __reduce_add_sync(mine, value);
    out[160 + lane()] = __reduce_min_sync(mine, value);
    out[192 + lane()] = __reduce_max_sync(mine, value);
    out[224 + lane()] = __reduce_or_sync(mine, static_cast<unsigned>(value));
    out[256 + lane()] = __reduce_and_sync(mine, static_cast<unsigned>(value));
  };
  if (mask >> lane() & 1) {
    vote(mask);
  } else {
    vote(~mask);
  }
}
__global__ void bits(unsigned* out, const unsigned* in, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const unsigned x = in[3 * i], y = in[3 * i + 1], s = in[3 * i + 2];
    out[7 * i] = __brev(x);
    out[7 * i + 1] = __popc(x);
    out[7 * i + 2] = __ffs(static_cast<int>(x));
    out[7 * i + 3] = __clz(static_cast<int>(x));
    out[7 * i + 4] = __byte_perm(x, y, s);
    out[7 * i + 5] = __funnelshift_l(x, y, s);
    out[7 * i + 6] = __umulhi(x, y);
  }
}

// ---- operations of a block and of all blocks ----------------------------------------------------

struct Totals {
  int32_t sum, largest, smallest, lock, locked_sum, ticket;
  uint32_t bits;
  float float_sum, float_largest;
  unsigned long long long_sum;
};

__global__ void totals(Totals* total, const int* in, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int value = in[i];
  atomicAdd(&total->sum, value);
  atomicAdd(&total->long_sum, static_cast<unsigned long long>(value) << 20);
  atomicAdd(&total->float_sum, static_cast<float>(value));
  atomicMax(&total->largest, value);
  atomicMin(&total->smallest, value);
  atomicOr(&total->bits, 1u << (value & 31));
  ptx::atomic_max(&total->float_largest, static_cast<float>(value));
  // One at a time: a lock by compare-and-swap.
  for (bool done = false; !done;) {
    if (atomicCAS(&total->lock, 0, 1) != 0) continue;
    total->locked_sum += value;
    __threadfence();
    atomicExch(&total->lock, 0);
    done = true;
  }
  ptx::add_release(&total->ticket, 1);
}

// Warp 0 hands numbers to the other warps through two buffers, with barriers 1 and 2 for "full" and
// 3 and 4 for "empty".
__global__ void handed_over(int* out, int rounds) {
  int* buffer = shared_memory<int>();
  const int threads = static_cast<int>(blockDim.x);
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      if (round >= 2) ptx::barrier_sync(3 + round % 2, threads);
      buffer[round % 2 * 32 + lane()] = 1000 * round + lane();
      ptx::barrier_arrive(1 + round % 2, threads);
    }
  } else {
    int sum = 0;
    for (int round = 0; round < rounds; ++round) {
      ptx::barrier_sync(1 + round % 2, threads);
      sum += buffer[round % 2 * 32 + lane()];
      if (round + 2 < rounds) ptx::barrier_arrive(3 + round % 2, threads);
    }
    out[threadIdx.x - 32] = sum;
  }
}
// A reduction over a block of any size, with its last warp partly empty.
__global__ void block_votes(int* out, const int* in) {
  const int value = in[threadIdx.x];
  const int count = __syncthreads_count(value > 0);
  const int any = __syncthreads_or(value > 100);
  const int all = __syncthreads_and(value > -100);
  int sum = value;
  for (int step = 16; step > 0; step /= 2) {
    const int other = __shfl_down_sync(0xffffffffu, sum, step);
    if (lane() + step < 32 && threadIdx.x + step < blockDim.x) sum += other;
  }
  int* sums = shared_memory<int>();
  if (lane() == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  out[0] = count, out[1] = any, out[2] = all, out[3] = 0;
  for (unsigned i = 0; i < (blockDim.x + 31) / 32; ++i) out[3] += sums[i];
}
// What shared memory holds before anybody writes to it.
__global__ void untouched(uint32_t* out) {
  out[threadIdx.x] = shared_memory<uint32_t>()[threadIdx.x];
}
__global__ void wait_for_ever(const int32_t* flag) {
  while (ptx::load_acquire(flag) == 0) {
  }
}
template <int Matrices>
void launch_load_matrices(bool transposed, uint32_t* out, const uint8_t* bytes, const int* offsets,
                          int count) {
  if (transposed) {
    launch(load_matrices<Matrices, true>, 1, 32, count, nullptr, out, bytes, offsets, count);
  } else {
    launch(load_matrices<Matrices, false>, 1, 32, count, nullptr, out, bytes, offsets, count);
  }
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

GOSSAMER_EXPORT int load_matrices(uint32_t* out, const uint8_t* bytes, const int* offsets,
                                  int64_t count, int64_t matrices, int64_t transposed, char* text,
                                  int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const int n = static_cast<int>(count);
    if (matrices == 1) launch_load_matrices<1>(transposed, out, bytes, offsets, n);
    if (matrices == 2) launch_load_matrices<2>(transposed, out, bytes, offsets, n);
    if (matrices == 4) launch_load_matrices<4>(transposed, out, bytes, offsets, n);
  });
}
GOSSAMER_EXPORT int one_mma(void* d, const uint32_t* a, const uint32_t* b, const uint32_t* metadata,
                            int64_t kind, int64_t selector, char* text, int64_t text_bytes) {
  const auto run = [&](auto kernel) { launch(kernel, 1, 32, 0, nullptr, d, a, b, metadata); };
  return report(text, text_bytes, [&] {
    switch (static_cast<Mma>(kind)) {
      case Mma::kF16: return run(one_mma<Mma::kF16, 0>);
      case Mma::kBF16: return run(one_mma<Mma::kBF16, 0>);
      case Mma::kTF32: return run(one_mma<Mma::kTF32, 0>);
      case Mma::kS8: return run(one_mma<Mma::kS8, 0>);
      case Mma::kE4M3: return run(one_mma<Mma::kE4M3, 0>);
      case Mma::kSparseF16:
        return selector ? run(one_mma<Mma::kSparseF16, 1>) : run(one_mma<Mma::kSparseF16, 0>);
      case Mma::kSparseBF16:
        return selector ? run(one_mma<Mma::kSparseBF16, 1>) : run(one_mma<Mma::kSparseBF16, 0>);
      case Mma::kSparseS8: return run(one_mma<Mma::kSparseS8, 0>);
      case Mma::kSparseE4M3: return run(one_mma<Mma::kSparseE4M3, 0>);
    }
  });
}
GOSSAMER_EXPORT int round_trip(void* rounded, float* back, const float* x, int64_t count,
                               int64_t type, char* text, int64_t text_bytes) {
  const auto run = [&](auto kernel, auto* to) {
    launch(kernel, 1, 64, 0, nullptr, to, back, x, static_cast<int>(count));
  };
  return report(text, text_bytes, [&] {
    if (type == 0) run(round_trip<BFloat16>, static_cast<BFloat16*>(rounded));
    if (type == 1) run(round_trip<Float16>, static_cast<Float16*>(rounded));
    if (type == 2) run(round_trip<int8_t>, static_cast<int8_t*>(rounded));
    if (type == 3) run(round_trip<E4M3>, static_cast<E4M3*>(rounded));
  });
}
GOSSAMER_EXPORT int packed_pairs(uint32_t* packed, float2* back, const float2* x, int64_t count,
                                 int64_t type, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const auto kernel = type == 0 ? packed_pairs<BFloat16> : packed_pairs<Float16>;
    launch(kernel, 1, 64, 0, nullptr, packed, back, x, static_cast<int>(count));
  });
}
GOSSAMER_EXPORT int packed_fma(uint32_t* out, const uint32_t* abc, int64_t count, int64_t type,
                               char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const auto kernel = type == 0 ? packed_fma<BFloat16> : packed_fma<Float16>;
    launch(kernel, 1, 64, 0, nullptr, out, abc, static_cast<int>(count));
  });
}
GOSSAMER_EXPORT int bitwise(uint32_t* out, const uint32_t* abc, int64_t count, char* text,
                            int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(bitwise, 1, 64, 0, nullptr, out, abc, static_cast<int>(count)); });
}
GOSSAMER_EXPORT int packed_quads(uint32_t* packed, const float4* x, int64_t count, char* text,
                                 int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    launch(packed_quads, 1, 64, 0, nullptr, packed, x, static_cast<int>(count));
  });
}
GOSSAMER_EXPORT int rounded_tf32(uint32_t* rounded, const float* x, int64_t count, char* text,
                                 int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    launch(rounded_tf32, 1, 64, 0, nullptr, rounded, x, static_cast<int>(count));
  });
}
GOSSAMER_EXPORT int copies(uint8_t* out, const uint8_t* in, const int* valid, int64_t bytes,
                           char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const auto kernel = bytes == 16 ? copies<16> : bytes == 8 ? copies<8> : copies<4>;
    launch(kernel, 1, 32, 32 * bytes, nullptr, out, in, valid);
  });
}
GOSSAMER_EXPORT int wide_copies(uint8_t* out, const uint8_t* in, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(wide_copies, 1, 32, 0, nullptr, out, in); });
}
GOSSAMER_EXPORT int shuffles(int* out, const int* in, int64_t width, int64_t by, char* text,
                             int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(shuffles, 1, 32, 0, nullptr, out, in, width, by); });
}
GOSSAMER_EXPORT int votes(unsigned* out, const int* in, int64_t mask, char* text,
                          int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(votes, 1, 32, 0, nullptr, out, in, mask); });
}
GOSSAMER_EXPORT int bits(unsigned* out, const unsigned* in, int64_t count, char* text,
                         int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(bits, 1, 64, 0, nullptr, out, in, count); });
}
GOSSAMER_EXPORT int totals(Totals* total, const int* in, int64_t count, char* text,
                           int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(totals, (count + 99) / 100, 100, 0, nullptr, total, in, count); });
}
GOSSAMER_EXPORT int handed_over(int* out, int64_t threads, int64_t rounds, char* text,
                                int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(handed_over, 1, threads, 64 * sizeof(int), nullptr, out, rounds); });
}
GOSSAMER_EXPORT int block_votes(int* out, const int* in, int64_t threads, char* text,
                                int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(block_votes, 1, threads, 32 * sizeof(int), nullptr, out, in); });
}
GOSSAMER_EXPORT int untouched(uint32_t* out, int64_t threads, int64_t words, char* text,
                              int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(untouched, 2, threads, 4 * words, nullptr, out); });
}
GOSSAMER_EXPORT int wait_for_ever(const int32_t* flag, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(wait_for_ever, 1, 1, 0, nullptr, flag); });
}
GOSSAMER_EXPORT int launch_shape(int64_t blocks, int64_t threads, int64_t shared_bytes, char* text,
                                 int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    launch(untouched, dim3(blocks), dim3(threads), shared_bytes, nullptr, nullptr);
  });
}
