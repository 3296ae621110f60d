// The GEMM kernel for int4 weights and the choice of how to cut it up, for the tests.
#include "kernels/exports.h"
#include "sparse24/choose_gemm_cuda.h"
#include "sparse24/gemm_int4_sm80.cu"

// config: tile_n, tile_m, warps_k, split_k.
GOSSAMER_EXPORT int gemm_int4(int64_t dtype, int64_t m, int64_t n, int64_t k, int64_t group,
                              const uint32_t* panels, const void* x, int64_t x_stride,
                              const void* bias, int64_t activation, void* out, int64_t out_dtype,
                              const float* scales, const int64_t* config, void* workspace,
                              int32_t* counters, char* text, int64_t text_bytes) {
  using namespace gossamer;
  using namespace gossamer::sparse24;
  return report(text, text_bytes, [&] {
    const CudaGemmConfig how{CudaKernel::kDecode, static_cast<int>(config[0]),
                             static_cast<int>(config[1]), static_cast<int>(config[2]),
                             static_cast<int>(config[3])};
    gemm_int4_sm80({static_cast<DType>(dtype), m, n, k, panels, x, x_stride, bias,
                    static_cast<Activation>(activation), out, static_cast<DType>(out_dtype),
                    nullptr, scales, how, workspace, counters, group},
                   nullptr);
  });
}

// chosen: the config as above, the bytes of its workspace and of its shared memory.
GOSSAMER_EXPORT int choose_int4(int64_t m, int64_t n, int64_t k, int64_t multiprocessors,
                                int64_t shared_bytes, int64_t* chosen, char* text,
                                int64_t text_bytes) {
  using namespace gossamer;
  using namespace gossamer::sparse24;
  return report(text, text_bytes, [&] {
    const CudaDevice device{80, static_cast<int>(multiprocessors), shared_bytes, int64_t{50} << 20};
    const CudaGemmConfig config = choose_cuda_gemm_config(m, n, k, DType::kUInt8, device);
    const int64_t block_m = std::min<int64_t>(m, config.tile_m);
    const int64_t values[] = {
        config.tile_n,
        config.tile_m,
        config.warps_k,
        config.split_k,
        workspace_bytes(config, m, n),
        decode_shared_bytes(block_m, DType::kUInt8, config.tile_m, config.warps_k)};
    std::copy(std::begin(values), std::end(values), chosen);
  });
}
