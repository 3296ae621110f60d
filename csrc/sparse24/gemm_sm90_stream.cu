// The Hopper GEMM for few rows of x (gemm_sm90_stream.cuh) of 16-bit types.
#include "sparse24/gemm_sm90_stream.cuh"

namespace gossamer::sparse24 {

void gemm_sm90_stream(const CudaGemmArgs& args, cudaStream_t stream) {
  if (size_of(args.dtype) == 1) return gemm_sm90_stream_8bit(args, stream);
  with_16bit_types(args,
                   [&](auto x) { stream_matrix<StoredWeights<decltype(x)>>(args, {}, stream); });
}

}  // namespace gossamer::sparse24
