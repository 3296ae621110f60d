#pragma once
// How the CUDA module runs a launcher for tensors whose device torch may not have made current.
#include "common/cuda.h"
#include "common/launch.cuh"

namespace gossamer {

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

}  // namespace gossamer
