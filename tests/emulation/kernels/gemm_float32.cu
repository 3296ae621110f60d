// The exact float32 GEMM, for Python.
#include "kernels/exports.h"
#include "sparse24/gemm_float32.cu"

// `config`: tile_n, tile_m, warps_k, split_k of `choose_float32_config`, which fills them, and the
// bytes of workspace. `device`: multiprocessors.
GOSSAMER_EXPORT int choose(int64_t* config, int64_t m, int64_t n, int64_t k,
                           int64_t multiprocessors, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    const CudaDevice device{90, static_cast<int>(multiprocessors), 227 << 10, 50 << 20};
    const sparse24::CudaGemmConfig c = sparse24::choose_float32_config(m, n, k, device);
    config[0] = c.tile_n, config[1] = c.tile_m, config[2] = c.warps_k, config[3] = c.split_k;
    config[4] = sparse24::float32_workspace_bytes(c, m, n);
  });
}

GOSSAMER_EXPORT int gemm(void* out, const void* x, int64_t x_stride, const uint32_t* panels,
                         const void* bias, int64_t activation, int64_t m, int64_t n, int64_t k,
                         int64_t tile_n, int64_t tile_m, int64_t warps_k, int64_t split_k,
                         void* workspace, int32_t* counters, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    sparse24::CudaGemmArgs args{};
    args.dtype = args.out_dtype = DType::kFloat32;
    args.m = m, args.n = n, args.k = k;
    args.panels = panels;
    args.x = x, args.x_stride = x_stride;
    args.bias = bias, args.activation = static_cast<Activation>(activation);
    args.out = out;
    args.config = {sparse24::CudaKernel::kFloat32, static_cast<int>(tile_n),
                   static_cast<int>(tile_m), static_cast<int>(warps_k), static_cast<int>(split_k)};
    args.workspace = workspace, args.counters = counters;
    sparse24::gemm_float32(args, nullptr);
  });
}
