// The products of experts, for the tests.
#include "grouped/gemm_cuda.h"
#include "kernels/exports.h"

// product: linear, input, weight. sizes: experts, tokens, n, k, then the distances of rows of the
// tokens and, of the product `weight`, of x. tile: of kMmaTiles, or -1 for what the choice says.
GOSSAMER_EXPORT int product(int64_t dtype, int64_t product, const int64_t* sizes,
                            const void* offsets, int64_t wide, const void* tokens,
                            const void* other, const void* bias, int64_t activation, void* out,
                            int64_t tile, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    constexpr CudaDevice kDevice{80, 4, 227 << 10, 50 << 20};
    grouped::CudaGroupedArgs args{};
    args.dtype = static_cast<DType>(dtype);
    args.product = static_cast<grouped::CudaProduct>(product);
    args.experts = sizes[0], args.tokens = sizes[1], args.n = sizes[2], args.k = sizes[3];
    args.tokens_stride = sizes[4], args.other_stride = sizes[5];
    args.offsets = offsets, args.wide_offsets = wide != 0;
    args.tokens_in = tokens, args.other = other, args.bias = bias, args.out = out;
    args.activation = static_cast<Activation>(activation);
    args.config = grouped::choose_cuda_config(args.dtype, args.product, sizes[0], sizes[1],
                                              sizes[2], sizes[3], kDevice);
    if (tile >= 0) args.config.tile = static_cast<int>(tile);
    grouped::run_product(args, nullptr);
  });
}
