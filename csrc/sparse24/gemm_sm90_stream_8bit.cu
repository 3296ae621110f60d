// The Hopper GEMM for few rows of x (gemm_sm90_stream.cuh) of 8-bit types.
#include "sparse24/gemm_sm90_stream.cuh"

namespace gossamer::sparse24 {

void gemm_sm90_stream_8bit(const CudaGemmArgs& args, cudaStream_t stream) {
  with_8bit_types(args,
                  [&](auto x) { stream_matrix<StoredWeights<decltype(x)>>(args, {}, stream); });
}

}  // namespace gossamer::sparse24
