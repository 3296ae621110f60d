// The products that skip zero activations, for the tests.
#include "actsparse/linear_cuda.h"
#include "kernels/exports.h"

// sizes: m, n, k, the distances of rows of x and of the weight, whether x is packed spikes, tokens
// of a block (0: what the choice says), split_k (0: the choice's).
GOSSAMER_EXPORT int linear(int64_t dtype, const int64_t* sizes, const void* x, const void* weight,
                           const void* bias, const float* threshold, int64_t activation, void* out,
                           float* workspace, int32_t* counters, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    actsparse::CudaLinearArgs args{};
    args.dtype = static_cast<DType>(dtype);
    args.m = sizes[0], args.n = sizes[1], args.k = sizes[2];
    args.x = x, args.x_stride = sizes[3], args.is_packed = sizes[5] != 0;
    args.weight = weight, args.weight_stride = sizes[4];
    args.bias = bias, args.threshold = *threshold, args.out = out;
    args.activation = static_cast<Activation>(activation);
    const bool aligned = actsparse::is_aligned_weight(args.dtype, weight, sizes[4], args.n);
    args.config = actsparse::choose_cuda_linear_config(args.dtype, args.m, args.n, args.k, aligned,
                                                       {80, 1, 227 << 10, 50 << 20});
    if (sizes[6] > 0) args.config.tokens = static_cast<int>(sizes[6]);
    if (sizes[7] > 0) args.config.split_k = static_cast<int>(sizes[7]);
    args.workspace = workspace, args.counters = counters;
    actsparse::linear_cuda(args, nullptr);
  });
}

// sizes: m, n, k, the distances of rows of x and of the weight, how many blocks there should be.
GOSSAMER_EXPORT int outputs(int64_t dtype, const int64_t* sizes, const void* x, const void* weight,
                            const void* bias, const uint8_t* wanted, int64_t activation, void* out,
                            char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    actsparse::outputs_cuda(
        {static_cast<DType>(dtype), sizes[0], sizes[1], sizes[2], x, sizes[3], weight, sizes[4],
         bias, wanted, static_cast<Activation>(activation), out, sizes[5]},
        nullptr);
  });
}
