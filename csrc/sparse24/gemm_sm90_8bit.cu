// The Hopper GEMM (gemm_sm90.cuh) of 8-bit types.
#include "sparse24/gemm_sm90.cuh"

namespace gossamer::sparse24 {

void gemm_sm90_8bit(const CudaGemmArgs& args, cudaStream_t stream) {
  with_8bit_types(args, [&](auto x) { multiply_matrix<decltype(x)>(args, stream); });
}

}  // namespace gossamer::sparse24
