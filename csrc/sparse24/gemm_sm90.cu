// The Hopper GEMM (gemm_sm90.cuh) of 16-bit types.
#include "common/check.h"
#include "sparse24/gemm_sm90.cuh"

namespace gossamer::sparse24 {

void gemm_sm90(const CudaGemmArgs& args, cudaStream_t stream) {
  const DType from = args.dtype, to = args.out_dtype;
  if (size_of(from) == 1) return gemm_sm90_8bit(args, stream);
  GOSSAMER_CHECK(args.x_scales == nullptr && args.row_scales == nullptr,
                 "sparse24_gemm: scales with ", name(from), ", which has none");
  if (from == DType::kBFloat16 && to == from) return by_tile<BFloat16, BFloat16>(args, stream);
  if (from == DType::kFloat16 && to == from) return by_tile<Float16, Float16>(args, stream);
  fail("sparse24_gemm: the Hopper kernel has no ", name(from), " to ", name(to));
}

}  // namespace gossamer::sparse24
