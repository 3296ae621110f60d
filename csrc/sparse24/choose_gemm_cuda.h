#pragma once
// Which kernel computes a GEMM on a GPU, and how it is cut up: a pure function of shape, dtype and
// device, tested without one.
#include "sparse24/gemm_cuda_config.h"
#include "sparse24/gemm_float32_config.h"

namespace gossamer::sparse24 {

// `dtype` is that of the weight's values and of x; kUInt8 says int4 weights, with 16-bit x. All of
// m, n and k are at least 1. There is no prefill kernel for int4 weights: decode's takes any m.
inline CudaGemmConfig choose_cuda_gemm_config(int64_t m, int64_t n, int64_t k, DType dtype,
                                              const CudaDevice& device) {
  if (dtype == DType::kFloat32) return choose_float32_config(m, n, k, device);
  if (m <= kDecodeRows || dtype == DType::kUInt8) return decode_config(m, n, k, dtype, device);
  return prefill_config(m, n, device);
}

inline int64_t workspace_bytes(const CudaGemmConfig& config, int64_t m, int64_t n) {
  if (config.kernel == CudaKernel::kFloat32) return float32_workspace_bytes(config, m, n);
  return config.workspace_bytes(m, n);
}

constexpr const char* reason(CudaKernel kernel) {
  switch (kernel) {
    case CudaKernel::kDecode: return "up to 64 rows: bound by reading the weights once";
    case CudaKernel::kPrefill: return "above 64 rows: bound by arithmetic";
    case CudaKernel::kWgmma: return "above 64 rows on Hopper: bound by arithmetic";
    case CudaKernel::kFloat32: return "exact float32, which tensor cores do not multiply";
  }
  return "?";
}

}  // namespace gossamer::sparse24
