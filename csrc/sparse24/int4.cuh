#pragma once
// int4 weights on their way to sparse products of 16-bit floats: how they are widened, and in which
// units of columns their scales are applied. A step is 32 columns.
#include <type_traits>

#include "common/check.h"
#include "common/ptx.cuh"
#include "sparse24/gemm_cuda.h"
#include "sparse24/group_scales.h"

namespace gossamer::sparse24 {
namespace {

// u in 0 .. 15 in the lowest bits of the mantissa of 2^7 (bfloat16) or 2^10 (float16) makes that
// plus u, because the mantissa's last bit is worth 1 there.
template <class T>
struct Widened;
template <>
struct Widened<BFloat16> {
  static constexpr uint32_t kPower = 0x43004300, kOne = 0x3f803f80, kBias = 0xc308c308;  // -136
};
template <>
struct Widened<Float16> {
  static constexpr uint32_t kPower = 0x64006400, kOne = 0x3c003c00, kBias = 0xe408e408;  // -1032
};

constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // lop3's table of (a and b) or c

// The A registers of a step: nibbles i and 4 + i of the word, less 8, exactly.
template <class T>
__device__ __forceinline__ void widen(uint32_t (&a)[4], uint32_t word) {
  using W = Widened<T>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] =
        ptx::fma2<T>(ptx::lop3<kAndOr>(word >> (4 * i), 0x000f000fu, W::kPower), W::kOne, W::kBias);
  }
}

constexpr int kInt4StepColumns = 32, kInt4UnitSteps = 4;

inline GroupScales group_scales(const CudaGemmArgs& args, int unit_steps) {
  const int64_t units = ceil_div(args.group, unit_steps * kInt4StepColumns);
  return {args.row_scales, static_cast<unsigned>(ceil_div(args.k, args.group)),
          static_cast<unsigned>(units), static_cast<unsigned>((int64_t{1} << 31) / units + 1)};
}

// unit / groups.units.
__device__ __forceinline__ unsigned column_of_unit(const GroupScales& groups, unsigned unit) {
  const unsigned column = __umulhi(2 * unit, groups.inverse);  // the quotient, or one more
  return column - (column * groups.units > unit ? 1 : 0);
}

// Calls run(T{}, steps of a unit, args), where the group of `args` is a multiple of the unit.
template <class Run>
void with_int4_units(CudaGemmArgs args, const Run& run) {
  constexpr int kUnitColumns = kInt4UnitSteps * kInt4StepColumns;
  // One scale a row: a group of any length that does not end.
  if (args.group >= args.k) args.group = ceil_div(args.k, kUnitColumns) * kUnitColumns;
  GOSSAMER_CHECK(args.group % kInt4StepColumns == 0, "sparse24: a group of ", args.group,
                 " columns is neither a multiple of ", kInt4StepColumns, " nor all ", args.k);
  const auto with_type = [&](auto zero) {
    args.group % kUnitColumns == 0 ? run(zero, std::integral_constant<int, kInt4UnitSteps>(), args)
                                   : run(zero, std::integral_constant<int, 1>(), args);
  };
  switch (args.dtype) {
    case DType::kBFloat16: return with_type(BFloat16{});
    case DType::kFloat16: return with_type(Float16{});
    default: fail("sparse24: int4 weights multiply bfloat16 or float16, x is ", name(args.dtype));
  }
}

}  // namespace
}  // namespace gossamer::sparse24
