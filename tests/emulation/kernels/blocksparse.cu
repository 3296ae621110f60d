// The block-sparse kernels and the choice between them, for the tests.
#include "blocksparse/conv_fma.cu"
#include "blocksparse/pack.cu"
#include "kernels/exports.h"

namespace {

using namespace gossamer;

// sizes: groups, C_out / groups, C_in / groups, rows, cols, nnz, then kernel, stride, padding,
// dilation, extents of x and of y (d, h, w each), the batch, and whether channels are last.
blocksparse::ConvArgs conv_args(int64_t dtype, const int64_t* sizes) {
  const int64_t* axes = sizes + 6;
  blocksparse::ConvArgs args{};
  args.weight = {static_cast<DType>(dtype),
                 sizes[0],
                 sizes[1],
                 axes[0] * axes[1] * axes[2],
                 sizes[2],
                 sizes[3],
                 sizes[4],
                 sizes[5],
                 nullptr,
                 nullptr,
                 nullptr};
  ConvShape& s = args.shape;
  s.groups = sizes[0], s.out_channels = sizes[0] * sizes[1], s.in_channels = sizes[0] * sizes[2];
  for (int i = 0; i < 3; ++i) {
    s.kernel[i] = axes[i], s.stride[i] = axes[3 + i], s.padding[i] = axes[6 + i];
    s.dilation[i] = axes[9 + i], s.in[i] = axes[12 + i], s.out[i] = axes[15 + i];
  }
  s.batch = axes[18], s.channels_last = axes[19] != 0;
  return args;
}

}  // namespace

// tile: of the kernel's table, or -1 for what the choice says on a GPU of that capability, with
// four multiprocessors.
GOSSAMER_EXPORT int conv(int64_t dtype, const int64_t* sizes, const int32_t* crow,
                         const int32_t* col, const void* values, const void* x, const void* bias,
                         const void* residual, int64_t activation, void* out, int64_t capability,
                         int64_t kernel, int64_t tile, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    blocksparse::CudaConvArgs args{conv_args(dtype, sizes), {}};
    args.conv.weight.crow_indices = crow, args.conv.weight.col_indices = col;
    args.conv.weight.values = values;
    args.conv.x = x, args.conv.bias = bias, args.conv.residual = residual, args.conv.out = out;
    args.conv.activation = static_cast<Activation>(activation);
    const CudaDevice device{static_cast<int>(capability), 4, 227 << 10, 50 << 20};
    args.config = blocksparse::choose_cuda_conv_config(args.conv.shape, args.conv.weight, device);
    if (tile >= 0) {
      args.config = {static_cast<blocksparse::CudaConvKernel>(kernel), static_cast<int>(tile), 4};
    }
    blocksparse::run_conv(args, nullptr);
  });
}

GOSSAMER_EXPORT int find_live(int64_t dtype, const int64_t* sizes, const void* dense, uint8_t* live,
                              char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    blocksparse::cuda::find_live(dense, conv_args(dtype, sizes).weight, live, nullptr);
  });
}

GOSSAMER_EXPORT int gather(int64_t dtype, const int64_t* sizes, const int32_t* crow,
                           const int32_t* col, const void* dense, void* values, char* text,
                           int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    blocksparse::Weight pattern = conv_args(dtype, sizes).weight;
    pattern.crow_indices = crow, pattern.col_indices = col;
    blocksparse::cuda::gather(dense, pattern, values, nullptr);
  });
}

GOSSAMER_EXPORT int to_dense(int64_t dtype, const int64_t* sizes, const int32_t* crow,
                             const int32_t* col, const void* values, void* dense, char* text,
                             int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    blocksparse::Weight weight = conv_args(dtype, sizes).weight;
    weight.crow_indices = crow, weight.col_indices = col, weight.values = values;
    blocksparse::cuda::to_dense(weight, dense, nullptr);
  });
}
