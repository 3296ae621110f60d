// The Hopper GEMM (gemm_sm90.cuh) of 16-bit types.
#include "sparse24/gemm_sm90.cuh"

namespace gossamer::sparse24 {

void gemm_sm90(const CudaGemmArgs& args, cudaStream_t stream) {
  if (size_of(args.dtype) == 1) return gemm_sm90_8bit(args, stream);
  with_16bit_types(args, [&](auto x) { multiply_matrix<decltype(x)>(args, stream); });
}

}  // namespace gossamer::sparse24
