// The table of this feature's kernels, each on the device of its tensors.
#include "sparse24/cuda_kernels.h"

#include "common/device.cuh"
#include "sparse24/conv_cuda.h"
#include "sparse24/gemm_cuda.h"
#include "sparse24/pack_cuda.h"

namespace gossamer::sparse24 {
namespace {

void gemm(const CudaGemmArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_gemm(args, s); });
}

void conv(const CudaConvArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_conv(args, s); });
}

Misfits from_dense(const void* dense, const Weight& shape, void* values, uint8_t* indices,
                   int64_t* status, CudaStream stream) {
  return on(stream, [&](cudaStream_t s) {
    return cuda::from_dense(dense, shape, values, indices, status, s);
  });
}

void gather(const void* dense, const Weight& pattern, void* values, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::gather(dense, pattern, values, s); });
}

void to_dense(const Weight& weight, void* dense, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::to_dense(weight, dense, s); });
}

Misfits validate(const Weight& weight, int64_t* status, CudaStream stream) {
  return on(stream, [&](cudaStream_t s) { return cuda::validate(weight, status, s); });
}

void to_panels(const Weight& weight, uint32_t* panels, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::to_panels(weight, panels, s); });
}

void from_panels(const Weight& panels, void* values, uint8_t* indices, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cuda::from_panels(panels, values, indices, s); });
}

constexpr CudaKernels kKernels = {
    gemm, conv, from_dense, gather, to_dense, validate, to_panels, from_panels,
};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::sparse24
