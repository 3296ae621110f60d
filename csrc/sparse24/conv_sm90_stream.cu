// 2:4 convolution on Hopper, of pixels that fill no large tiles (gemm_sm90_stream.cuh).
#include "sparse24/conv_sm90.cuh"
#include "sparse24/gemm_sm90_stream.cuh"

namespace gossamer::sparse24 {

void conv_sm90_stream(const CudaConvArgs& args, cudaStream_t stream) {
  const auto map_of = [&](int tokens) { return pixel_map(args, tokens); };
  with_16bit_types(args.gemm, [&](auto x) {
    stream_by_tile<StoredWeights<decltype(x)>>(args.gemm, map_of, {}, stream);
  });
}

}  // namespace gossamer::sparse24
