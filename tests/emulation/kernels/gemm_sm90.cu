// The Hopper GEMM's launcher, as Python calls it.
#include "kernels/exports.h"
#include "sparse24/gemm_sm90.cu"
#include "sparse24/gemm_sm90_8bit.cu"
#include "sparse24/gemm_sm90_stream.cu"
#include "sparse24/gemm_sm90_stream_8bit.cu"

// `settings`: dtype, out_dtype (of common/dtype.h), activation, m, n, k, x_stride, tile_n, tile_m,
// blocks and the kernel, wgmma or stream. `has`: whether bias, x_scales and row_scales are given;
// otherwise any pointers.
GOSSAMER_EXPORT int gemm_sm90(void* out, const void* x, const uint32_t* fragments, const void* bias,
                              const float* x_scales, const float* row_scales, void* workspace,
                              int32_t* counters, const int64_t* settings, const int64_t* has,
                              char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    sparse24::CudaGemmArgs args{};
    args.dtype = static_cast<DType>(settings[0]);
    args.out_dtype = static_cast<DType>(settings[1]);
    args.activation = static_cast<Activation>(settings[2]);
    args.m = settings[3];
    args.n = settings[4];
    args.k = settings[5];
    args.x_stride = settings[6];
    args.config = {static_cast<sparse24::CudaKernel>(settings[10]),
                   static_cast<int>(settings[7]),
                   static_cast<int>(settings[8]),
                   1,
                   1,
                   static_cast<int>(settings[9])};
    args.panels = fragments;
    args.x = x;
    args.out = out;
    args.bias = has[0] ? bias : nullptr;
    args.x_scales = has[1] ? x_scales : nullptr;
    args.row_scales = has[2] ? row_scales : nullptr;
    args.workspace = workspace;
    args.counters = counters;
    const bool stream = args.config.kernel == sparse24::CudaKernel::kStream;
    stream ? sparse24::gemm_sm90_stream(args, nullptr) : sparse24::gemm_sm90(args, nullptr);
  });
}
