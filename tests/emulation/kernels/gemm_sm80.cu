// The GEMM kernels with portable instructions and the choice between them, for the tests.
#include "common/launch.cuh"
#include "kernels/exports.h"
#include "sparse24/choose_gemm_cuda.h"
#include "sparse24/gemm_decode_sm80.cu"
#include "sparse24/gemm_prefill_sm80.cu"

// config: kernel, tile_n, tile_m, warps_k, split_k.
GOSSAMER_EXPORT int gemm_sm80(int64_t dtype, int64_t m, int64_t n, int64_t k,
                              const uint32_t* panels, const void* x, int64_t x_stride,
                              const void* bias, int64_t activation, void* out, int64_t out_dtype,
                              const float* x_scales, const float* row_scales, const int64_t* config,
                              void* workspace, int32_t* counters, char* text, int64_t text_bytes) {
  using namespace gossamer;
  using namespace gossamer::sparse24;
  return report(text, text_bytes, [&] {
    const CudaGemmConfig how{static_cast<CudaKernel>(config[0]), static_cast<int>(config[1]),
                             static_cast<int>(config[2]), static_cast<int>(config[3]),
                             static_cast<int>(config[4])};
    const CudaGemmArgs args{static_cast<DType>(dtype),
                            m,
                            n,
                            k,
                            panels,
                            x,
                            x_stride,
                            bias,
                            static_cast<Activation>(activation),
                            out,
                            static_cast<DType>(out_dtype),
                            x_scales,
                            row_scales,
                            how,
                            workspace,
                            counters};
    how.kernel == CudaKernel::kDecode ? gemm_decode_sm80(args, nullptr)
                                      : gemm_prefill_sm80(args, nullptr);
  });
}

// chosen: the config as above, the bytes of its workspace and of its shared memory, and what the
// model thinks of it.
GOSSAMER_EXPORT int choose_gemm(int64_t dtype, int64_t m, int64_t n, int64_t k, int64_t capability,
                                int64_t multiprocessors, int64_t shared_bytes, int64_t* chosen,
                                char* text, int64_t text_bytes) {
  using namespace gossamer;
  using namespace gossamer::sparse24;
  return report(text, text_bytes, [&] {
    const auto type = static_cast<DType>(dtype);
    const CudaDevice device{static_cast<int>(capability), static_cast<int>(multiprocessors),
                            shared_bytes, int64_t{50} << 20};
    const CudaGemmConfig config = choose_cuda_gemm_config(m, n, k, type, device);
    const int64_t shared = config.kernel == CudaKernel::kDecode
                               ? decode_shared_bytes(m, type, config.tile_m, config.warps_k)
                               : prefill_shared_bytes(config.tile_m);
    const int64_t values[] = {static_cast<int64_t>(config.kernel),
                              config.tile_n,
                              config.tile_m,
                              config.warps_k,
                              config.split_k,
                              config.workspace_bytes(m, n),
                              shared};
    std::copy(std::begin(values), std::end(values), chosen);
  });
}
