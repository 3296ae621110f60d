// The table of this feature's kernels, each behind a guard that makes the tensors' device the
// current one, since torch's current device may be another.
#include <mutex>
#include <vector>

#include "common/launch.cuh"
#include "sparse24/cuda_kernels.h"
#include "sparse24/gemm_cuda.h"
#include "sparse24/pack_cuda.h"

namespace gossamer::sparse24 {
namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    GOSSAMER_CUDA_CHECK(cudaGetDevice(&before_));
    changed_ = before_ != device;
    if (changed_) GOSSAMER_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Runs a launcher on the device and stream of its tensors.
template <class Call>
auto on(CudaStream stream, const Call& call) {
  const DeviceGuard guard(stream.device);
  return call(static_cast<cudaStream_t>(stream.stream));
}

CudaDevice query(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    GOSSAMER_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrL2CacheSize)};
}

// A device does not change while the process runs, and every call asks for it.
CudaDevice device(int index) {
  static std::once_flag once;
  static std::vector<CudaDevice> devices;
  std::call_once(once, [] {
    int count = 0;
    GOSSAMER_CUDA_CHECK(cudaGetDeviceCount(&count));
    for (int i = 0; i < count; ++i) devices.push_back(query(i));
  });
  if (index < 0 || index >= static_cast<int>(devices.size())) {
    throw std::invalid_argument("gossamer: device cuda:" + std::to_string(index) +
                                ", but there are " + std::to_string(devices.size()));
  }
  return devices[index];
}

void gemm(const CudaGemmArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_gemm(args, s); });
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

uint64_t capture(CudaStream stream) {
  return on(stream, [](cudaStream_t s) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    GOSSAMER_CUDA_CHECK(cudaStreamGetCaptureInfo(s, &status, &id));
    return status == cudaStreamCaptureStatusActive ? uint64_t{id} : uint64_t{0};
  });
}

void relax_capture() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  GOSSAMER_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
}

constexpr CudaKernels kKernels = {
    build_of_cuda(),
    /*host_memory=*/false,
    device,
    gemm,
    from_dense,
    gather,
    to_dense,
    validate,
    to_panels,
    from_panels,
    capture,
    relax_capture,
};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::sparse24
