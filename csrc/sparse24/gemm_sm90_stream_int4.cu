// The Hopper GEMM for few rows of x (gemm_sm90_stream.cuh) of int4 weights.
#include "sparse24/gemm_sm90_stream.cuh"

namespace gossamer::sparse24 {

void gemm_sm90_stream_int4(const CudaGemmArgs& args, cudaStream_t stream) {
  with_int4_units(args, [&](auto zero, auto steps, const CudaGemmArgs& with_units) {
    using T = decltype(zero);
    constexpr int kUnit = decltype(steps)::value;
    CudaGemmArgs without_scales = with_units;  // for the end of the sums
    without_scales.row_scales = nullptr;
    stream_matrix<Int4Weights<T, kUnit>>(without_scales, group_scales(with_units, kUnit), stream);
  });
}

}  // namespace gossamer::sparse24
