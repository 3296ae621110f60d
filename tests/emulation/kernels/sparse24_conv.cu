// The 2:4 convolutions, for the tests.
#include "kernels/exports.h"
#include "sparse24/conv_cuda.h"
#include "sparse24/conv_sm80.cu"

// sizes: the batch, groups, C_in and C_out, then kernel, stride, padding, dilation, extents of x
// and of y (d, h, w each). config: kernel, tile_n, tile_m, warps_k, split_k and blocks.
GOSSAMER_EXPORT int conv(int64_t dtype, const int64_t* sizes, const uint32_t* panels, const void* x,
                         const void* bias, int64_t activation, void* out, const int64_t* config,
                         void* workspace, int32_t* counters, char* text, int64_t text_bytes) {
  using namespace gossamer;
  using namespace gossamer::sparse24;
  return report(text, text_bytes, [&] {
    CudaConvArgs args{};
    ConvShape& s = args.shape;
    s.channels_last = true;
    s.batch = sizes[0], s.groups = sizes[1], s.in_channels = sizes[2], s.out_channels = sizes[3];
    for (int i = 0; i < 3; ++i) {
      s.kernel[i] = sizes[4 + i], s.stride[i] = sizes[7 + i], s.padding[i] = sizes[10 + i];
      s.dilation[i] = sizes[13 + i], s.in[i] = sizes[16 + i], s.out[i] = sizes[19 + i];
    }
    const ConvProduct of(s);
    CudaGemmArgs& gemm = args.gemm;
    gemm.dtype = gemm.out_dtype = static_cast<DType>(dtype);
    gemm.m = of.m, gemm.n = of.n, gemm.k = of.k;
    gemm.panels = panels;
    gemm.x = x;
    gemm.x_stride = s.in_channels;
    gemm.bias = bias;
    gemm.activation = static_cast<Activation>(activation);
    gemm.out = out;
    gemm.workspace = workspace;
    gemm.counters = counters;
    const auto number = [&](int i) { return static_cast<int>(config[i]); };
    gemm.config = {
        static_cast<CudaKernel>(config[0]), number(1), number(2), number(3), number(4), number(5)};
    run_conv(args, nullptr);
  });
}
