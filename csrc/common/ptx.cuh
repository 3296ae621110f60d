#pragma once
// Every PTX instruction that the portable kernels use, one thin named function each; Hopper's own
// are in ptx_sm90.cuh and ptx_wgmma.cuh, and asm is in these three files only. CUDA's intrinsics
// (__shfl_sync, atomicAdd, __popc, ...) are used by their names. The host twin,
// tests/emulation/twins/common/ptx.cuh, has the same names and signatures: a change here is a
// change there.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace gossamer::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Keeps a value in a register, where the compiler would rather compute it again in every turn of a
// loop, from the number of the thread on.
template <class T>  // of 4 or 8 bytes
__device__ __forceinline__ T keep(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

// ---- numbers ------------------------------------------------------------------------------------

// What products of T are summed in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float to_float(E4M3 x) {  // sm_89
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(x.bits)));
  return ptx::to_float(Float16{static_cast<uint16_t>(halves)});
}

// Round to nearest even; to E4M3 and int8_t, what is out of range becomes the largest in it.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
  } else if constexpr (std::is_same_v<T, Float16>) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
  } else if constexpr (std::is_same_v<T, E4M3>) {  // sm_89
    uint16_t bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(0.0f), "f"(x));
    return {static_cast<uint8_t>(bits)};
  } else {
    static_assert(std::is_same_v<T, int8_t>);
    int32_t rounded;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return static_cast<int8_t>(rounded);
  }
}

// Two BFloat16 or Float16 in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t two;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, Float16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  }
  return two;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  return {ptx::to_float(T{static_cast<uint16_t>(two)}),
          ptx::to_float(T{static_cast<uint16_t>(two >> 16)})};
}
// a b + c of both halves, each rounded once.
template <class T>  // BFloat16 or Float16
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t two;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(std::is_same_v<T, Float16>);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
  }
  return two;
}
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {  // sm_89
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x1), "f"(x0));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x3), "f"(x2));
  return low | static_cast<uint32_t>(high) << 16;
}
// Ten bits after the leading one, a tie away from zero; the register keeps the other 13 bits zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Bit by bit the entry 4a + 2b + c of the table, which is thus the wanted function of 0xf0, 0xcc
// and 0xaa. The compiler makes two instructions of two constants in one expression.
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}

// ---- cp.async: global to shared memory, past the registers --------------------------------------
//
// Bytes past `valid_bytes` become zero and are not read. The data are there for the issuing thread
// after cp_async_wait<P>() (all but its P latest groups), for others after a barrier that follows.

__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid_bytes)
      : "memory");
}
__device__ __forceinline__ void cp_async16_hint(void* shared, const void* global, int valid_bytes,
                                                uint64_t l2_policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(valid_bytes), "l"(l2_policy)
               : "memory");
}
__device__ __forceinline__ void cp_async8(void* shared, const void* global, int valid_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async4(void* shared, const void* global, int valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- 16 bytes from and to global memory ---------------------------------------------------------

// How long the L2 should keep what a load brings: for weights that are read once, and for what all
// blocks read.
__device__ __forceinline__ uint64_t l2_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t l2_evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Data that no thread writes during the kernel, past the L1.
__device__ __forceinline__ uint4 load_nc16(const void* global) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(global));
  return v;
}
__device__ __forceinline__ uint4 load_nc16_hint(const void* global, uint64_t l2_policy) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(global), "l"(l2_policy));
  return v;
}
// The same for a load that should be issued where it stands: ptxas moves the others down to their
// use, past waits and barriers.
__device__ __forceinline__ uint4 load16(const void* global) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
}
__device__ __forceinline__ void store16(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
// What this kernel does not read again.
__device__ __forceinline__ void store16_stream(void* global, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- flags and counters between blocks ----------------------------------------------------------

__device__ __forceinline__ int32_t load_acquire(const int32_t* global) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int32_t* global, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}
__device__ __forceinline__ void add_release(int32_t* global, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}
// Finite floats are ordered as their bits: as int where positive, in reverse as unsigned where
// negative.
__device__ __forceinline__ float atomic_max(float* address, float value) {
  return signbit(value)
             ? __uint_as_float(
                   atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(value)))
             : __int_as_float(atomicMax(reinterpret_cast<int*>(address), __float_as_int(value)));
}

// ---- named barriers: `id` 0 is __syncthreads, `threads` a multiple of 32 ------------------------

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements into fragments ---------------------------------
//
// Lanes 8m to 8m + 7 point at the rows of matrix m. Lane 4g + t gets in register m the elements 2t
// and 2t + 1 of its row g; transposed, element g of its rows 2t and 2t + 1.

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- tensor cores: D[16][8] += A[16][K] B[K][8] of a warp ---------------------------------------
//
// Lane 4g + t holds, with E elements of T in a register and S columns stored of each row of A:
//
//   A [16][S]  register i, element e: row g + 8 (i mod 2), column E t + 4E (i / 2) + e
//   B [K][8]   register i, element e: row E t + 4E i + e, column g
//   D [16][8]  register i:            row g + 8 (i / 2), column 2t + i mod 2

#define GOSSAMER_MMA(shape_and_types, constraint)                                  \
  asm volatile("mma.sync.aligned." shape_and_types                                 \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
               : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), \
                 "+" constraint(d[3])                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

#define GOSSAMER_MMA_SP(shape_and_types, constraint, selector)                                  \
  asm volatile(                                                                                 \
      "mma.sp::ordered_metadata.sync.aligned." shape_and_types                                  \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, "        \
      "%13;"                                                                                    \
      : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
        "r"(metadata), "n"(selector))

template <class T>  // Float16 or BFloat16
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    GOSSAMER_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
  } else {
    static_assert(std::is_same_v<T, Float16>);
    GOSSAMER_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f");
  }
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  GOSSAMER_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "f");
}
template <class T>  // int8_t, or E4M3 (sm_89)
__device__ __forceinline__ void mma_m16n8k32(Accumulator<T> (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, int8_t>) {
    GOSSAMER_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r");
  } else {
    static_assert(std::is_same_v<T, E4M3>);
    GOSSAMER_MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32", "f");
  }
}

// Sparse: A stores two of every four columns (S = K / 2), and `metadata` two bits for each stored
// element: its column in its group of four, the first of a pair in the lower bits and the smaller.
//
//   16-bit types  lanes 4g + 2F and 4g + 2F + 1 (F the selector) hold columns 0-15 and 16-31, row g
//                 in the low half of the register and row g + 8 in the high half; others are
//                 ignored
//   8-bit types   lane 4g + t holds 32 columns of row g + 8 (t mod 2), from column 32 (t / 2) on

// Whether the tensor cores of an architecture (10 * major + minor) take T in mma.sp. Before sm_89
// there is no such instruction for E4M3, and datacenter GPUs after it emulate it with Float16 at
// many times the instructions and registers (wgmma, on sm_90, has it).
template <class T>
__host__ __device__ constexpr bool has_mma_sp(int architecture) {
  return !std::is_same_v<T, E4M3> || architecture == 89 || architecture >= 120;
}
// For the code that is being compiled.
template <class T>
#ifdef __CUDA_ARCH__
constexpr bool kHasMmaSp = has_mma_sp<T>(__CUDA_ARCH__ / 10);
#else
constexpr bool kHasMmaSp = true;
#endif

template <class T, int Selector>  // Float16 or BFloat16; Selector 0 or 1
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    GOSSAMER_MMA_SP("m16n8k32.row.col.f32.bf16.bf16.f32", "f", Selector);
  } else {
    static_assert(std::is_same_v<T, Float16>);
    GOSSAMER_MMA_SP("m16n8k32.row.col.f32.f16.f16.f32", "f", Selector);
  }
}
template <class T>  // int8_t, or E4M3 (sm_89; use wgmma on sm_90, where this is emulated)
__device__ __forceinline__ void mma_sp_m16n8k64(Accumulator<T> (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, int8_t>) {
    GOSSAMER_MMA_SP("m16n8k64.row.col.s32.s8.s8.s32", "r", 0);
  } else {
    static_assert(std::is_same_v<T, E4M3>);
    GOSSAMER_MMA_SP("m16n8k64.row.col.f32.e4m3.e4m3.f32", "f", 0);
  }
}

#undef GOSSAMER_MMA
#undef GOSSAMER_MMA_SP

}  // namespace gossamer::ptx
