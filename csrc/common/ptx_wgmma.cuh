#pragma once
// wgmma and wgmma.sp, included by ptx_sm90.cuh. An accumulator is an operand of its own in the
// instruction, 128 of them at N = 256, so macros write the lists of operands.
#include "common/ptx.cuh"

// ---- lists: the text "%0, %1, ..." and the constraints of the registers d[0], d[1], ... ---------

#define GOSSAMER_TEXT_4 "%0, %1, %2, %3"
#define GOSSAMER_TEXT_8 GOSSAMER_TEXT_4 ", %4, %5, %6, %7"
#define GOSSAMER_TEXT_10 GOSSAMER_TEXT_8 ", %8, %9"
#define GOSSAMER_TENS_4(t) ", %" #t "0, %" #t "1, %" #t "2, %" #t "3"
#define GOSSAMER_TENS_6(t) GOSSAMER_TENS_4(t) ", %" #t "4, %" #t "5"
#define GOSSAMER_TENS_8(t) GOSSAMER_TENS_6(t) ", %" #t "6, %" #t "7"
#define GOSSAMER_TENS(t) GOSSAMER_TENS_8(t) ", %" #t "8, %" #t "9"
#define GOSSAMER_TEXT_16 GOSSAMER_TEXT_10 GOSSAMER_TENS_6(1)
#define GOSSAMER_TEXT_30 GOSSAMER_TEXT_10 GOSSAMER_TENS(1) GOSSAMER_TENS(2)
#define GOSSAMER_TEXT_32 GOSSAMER_TEXT_30 ", %30, %31"
#define GOSSAMER_TEXT_40 GOSSAMER_TEXT_30 GOSSAMER_TENS(3)
#define GOSSAMER_TEXT_48 GOSSAMER_TEXT_40 GOSSAMER_TENS_8(4)
#define GOSSAMER_TEXT_60 GOSSAMER_TEXT_40 GOSSAMER_TENS(4) GOSSAMER_TENS(5)
#define GOSSAMER_TEXT_64 GOSSAMER_TEXT_60 GOSSAMER_TENS_4(6)
#define GOSSAMER_TEXT_90 GOSSAMER_TEXT_60 GOSSAMER_TENS(6) GOSSAMER_TENS(7) GOSSAMER_TENS(8)
#define GOSSAMER_TEXT_96 GOSSAMER_TEXT_90 GOSSAMER_TENS_6(9)
#define GOSSAMER_TEXT_120 GOSSAMER_TEXT_90 GOSSAMER_TENS(9) GOSSAMER_TENS(10) GOSSAMER_TENS(11)
#define GOSSAMER_TEXT_128 GOSSAMER_TEXT_120 GOSSAMER_TENS_8(12)

#define GOSSAMER_LIST_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define GOSSAMER_LIST_8(c, i) GOSSAMER_LIST_4(c, i), GOSSAMER_LIST_4(c, i + 4)
#define GOSSAMER_LIST_16(c, i) GOSSAMER_LIST_8(c, i), GOSSAMER_LIST_8(c, i + 8)
#define GOSSAMER_LIST_32(c, i) GOSSAMER_LIST_16(c, i), GOSSAMER_LIST_16(c, i + 16)
#define GOSSAMER_LIST_48(c, i) GOSSAMER_LIST_32(c, i), GOSSAMER_LIST_16(c, i + 32)
#define GOSSAMER_LIST_64(c, i) GOSSAMER_LIST_32(c, i), GOSSAMER_LIST_32(c, i + 32)
#define GOSSAMER_LIST_96(c, i) GOSSAMER_LIST_64(c, i), GOSSAMER_LIST_32(c, i + 64)
#define GOSSAMER_LIST_128(c, i) GOSSAMER_LIST_64(c, i), GOSSAMER_LIST_64(c, i + 64)

// ---- the instruction: D registers of type `c`, then `operands`, the predicate, `tail` -----------

#define GOSSAMER_ISSUE(instruction, D, c, operands, keep, tail, ...)               \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep ", 0;\n" instruction \
               " {" GOSSAMER_TEXT_##D "}, " operands ", keep" tail ";\n}"          \
               : GOSSAMER_LIST_##D(c, 0)                                           \
               : __VA_ARGS__)

// The same for each type of element; 16-bit operands can be transposed, which is not used.
#define GOSSAMER_BY_TYPE(sparse, N, K16, K8, D, operands, keep, transpose, ...)                    \
  if constexpr (std::is_same_v<T, BFloat16>) {                                                     \
    GOSSAMER_ISSUE("wgmma.mma_async" sparse ".sync.aligned.m64n" #N "k" #K16 ".f32.bf16.bf16", D,  \
                   "+f", operands, keep, ", 1, 1" transpose, __VA_ARGS__);                         \
  } else if constexpr (std::is_same_v<T, Float16>) {                                               \
    GOSSAMER_ISSUE("wgmma.mma_async" sparse ".sync.aligned.m64n" #N "k" #K16 ".f32.f16.f16", D,    \
                   "+f", operands, keep, ", 1, 1" transpose, __VA_ARGS__);                         \
  } else if constexpr (std::is_same_v<T, E4M3>) {                                                  \
    GOSSAMER_ISSUE("wgmma.mma_async" sparse ".sync.aligned.m64n" #N "k" #K8 ".f32.e4m3.e4m3", D,   \
                   "+f", operands, keep, ", 1, 1", __VA_ARGS__);                                   \
  } else {                                                                                         \
    static_assert(std::is_same_v<T, int8_t>);                                                      \
    GOSSAMER_ISSUE("wgmma.mma_async" sparse ".sync.aligned.m64n" #N "k" #K8 ".s32.s8.s8", D, "+r", \
                   operands, keep, "", __VA_ARGS__);                                               \
  }

// `o0` to `o7` are the numbers of the operands after the D registers.
#define GOSSAMER_SHAPE(N, D, o0, o1, o2, o3, o4, o5, o6, o7)                                      \
  template <>                                                                                     \
  struct Wgmma<N> {                                                                               \
    template <class T>                                                                            \
    static __device__ __forceinline__ void dense(Accumulator<T> (&d)[D], uint64_t a, uint64_t b,  \
                                                 int keep) {                                      \
      GOSSAMER_BY_TYPE("", N, 16, 32, D, "%" #o0 ", %" #o1, "%" #o2, ", 0, 0", "l"(a), "l"(b),    \
                       "r"(keep))                                                                 \
    }                                                                                             \
    template <class T>                                                                            \
    static __device__ __forceinline__ void dense(Accumulator<T> (&d)[D], const uint32_t (&a)[4],  \
                                                 uint64_t b, int keep) {                          \
      GOSSAMER_BY_TYPE("", N, 16, 32, D, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4,       \
                       "%" #o5, ", 0", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),        \
                       "r"(keep))                                                                 \
    }                                                                                             \
    template <class T, int Selector>                                                              \
    static __device__ __forceinline__ void sparse(Accumulator<T> (&d)[D], uint64_t a, uint64_t b, \
                                                  uint32_t metadata, int keep) {                  \
      GOSSAMER_BY_TYPE(".sp", N, 32, 64, D, "%" #o0 ", %" #o1 ", %" #o2 ", %" #o3, "%" #o4,       \
                       ", 0, 0", "l"(a), "l"(b), "r"(metadata), "n"(Selector), "r"(keep))         \
    }                                                                                             \
    template <class T, int Selector>                                                              \
    static __device__ __forceinline__ void sparse(Accumulator<T> (&d)[D], const uint32_t (&a)[4], \
                                                  uint64_t b, uint32_t metadata, int keep) {      \
      GOSSAMER_BY_TYPE(".sp", N, 32, 64, D,                                                       \
                       "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", %" #o5 ", %" #o6,     \
                       "%" #o7, ", 0", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),        \
                       "r"(metadata), "n"(Selector), "r"(keep))                                   \
    }                                                                                             \
  };

namespace gossamer::ptx {

template <int N>
struct Wgmma;

GOSSAMER_SHAPE(8, 4, 4, 5, 6, 7, 8, 9, 10, 11)
GOSSAMER_SHAPE(16, 8, 8, 9, 10, 11, 12, 13, 14, 15)
GOSSAMER_SHAPE(32, 16, 16, 17, 18, 19, 20, 21, 22, 23)
GOSSAMER_SHAPE(64, 32, 32, 33, 34, 35, 36, 37, 38, 39)
GOSSAMER_SHAPE(96, 48, 48, 49, 50, 51, 52, 53, 54, 55)
GOSSAMER_SHAPE(128, 64, 64, 65, 66, 67, 68, 69, 70, 71)
GOSSAMER_SHAPE(192, 96, 96, 97, 98, 99, 100, 101, 102, 103)
GOSSAMER_SHAPE(256, 128, 128, 129, 130, 131, 132, 133, 134, 135)

// D = A B where `accumulate` is false. `a` is a matrix_descriptor, or the registers of this warp's
// rows of A. N is one of the sizes above.
template <class T, int N, class A>
__device__ __forceinline__ void wgmma(Accumulator<T> (&d)[N / 2], const A& a, uint64_t b,
                                      bool accumulate) {
  Wgmma<N>::template dense<T>(d, a, b, accumulate);
}
// Sparse: metadata as in mma.sp, each warp for its own 16 rows of A. Selector 0 or 1 for 16-bit
// types, 0 for 8-bit types.
template <class T, int N, int Selector, class A>
__device__ __forceinline__ void wgmma_sp(Accumulator<T> (&d)[N / 2], const A& a, uint64_t b,
                                         uint32_t metadata, bool accumulate) {
  Wgmma<N>::template sparse<T, Selector>(d, a, b, metadata, accumulate);
}

}  // namespace gossamer::ptx

#undef GOSSAMER_ISSUE
#undef GOSSAMER_BY_TYPE
#undef GOSSAMER_SHAPE
