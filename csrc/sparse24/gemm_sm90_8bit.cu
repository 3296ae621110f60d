// The Hopper GEMM (gemm_sm90.cuh) of 8-bit types; a unit of its own, as each kernel takes seconds
// to compile.
//
// Hopper sums products of E4M3 with fewer bits than float32 has (about 14 of mantissa), so the
// rounding of a long sum grows with K; products of int8 are summed exactly.
#include "common/check.h"
#include "sparse24/gemm_sm90.cuh"

namespace gossamer::sparse24 {
namespace {

template <class T>
void by_result(const CudaGemmArgs& args, cudaStream_t stream) {
  switch (args.out_dtype) {
    case DType::kBFloat16: return by_tile<T, BFloat16>(args, stream);
    case DType::kFloat16: return by_tile<T, Float16>(args, stream);
    case DType::kFloat32: return by_tile<T, float>(args, stream);
    default: break;
  }
  fail("sparse24_gemm: the Hopper kernel has no ", name(args.dtype), " to ", name(args.out_dtype));
}

}  // namespace

void gemm_sm90_8bit(const CudaGemmArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::kE4M3) return by_result<E4M3>(args, stream);
  if (args.dtype == DType::kInt8) return by_result<int8_t>(args, stream);
  fail("sparse24_gemm: the Hopper kernel has no ", name(args.dtype));
}

}  // namespace gossamer::sparse24
