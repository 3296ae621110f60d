// The CUDA half of gossamer: its kernels, handed to _C as tables, and which devices are here. It
// links cudart statically and loads on machines without a GPU or a driver, where it answers that
// there is none.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "actsparse/cuda_kernels.h"
#include "actsparse/topk_cuda_kernels.h"
#include "blocksparse/cuda_kernels.h"
#include "common/device.cuh"
#include "cuda_build.h"
#include "grouped/cuda_kernels.h"
#include "pointcloud/cuda_kernels.h"
#include "sparse24/cuda_kernels.h"

namespace py = pybind11;

namespace gossamer {
namespace {

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

void read(void* host, const void* from, size_t bytes, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { copy_to_host(host, from, bytes, s); });
}

const CudaModule kModule = {
    build_of_cuda(),
    /*host_memory=*/false,
    device,
    capture,
    relax_capture,
    read,
    actsparse::cuda_kernel_table(),
    blocksparse::cuda_kernel_table(),
    grouped::cuda_kernel_table(),
    pointcloud::cuda_kernel_table(),
    sparse24::cuda_kernel_table(),
    actsparse::topk::cuda_kernel_table(),
};

}  // namespace
}  // namespace gossamer

namespace {

// Where there is no usable driver, that is an answer (no devices), not an error.
int count_devices(cudaError_t* status) {
  int count = 0;
  *status = cudaGetDeviceCount(&count);
  if (*status == cudaSuccess) return count;
  cudaGetLastError();  // so that no later call is blamed for it
  return 0;
}

py::list devices() {
  py::list found;
  cudaError_t status;
  const int count = count_devices(&status);
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) {
      throw std::runtime_error("cudaGetDeviceProperties(" + std::to_string(device) +
                               "): " + cudaGetErrorString(status));
    }
    py::dict answer;
    answer["name"] = properties.name;
    answer["compute_capability"] = py::make_tuple(properties.major, properties.minor);
    answer["memory"] = properties.totalGlobalMem;
    answer["multiprocessors"] = properties.multiProcessorCount;
    found.append(answer);
  }
  return found;
}

std::string driver_status() {
  cudaError_t status;
  count_devices(&status);
  return cudaGetErrorString(status);
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.def("devices", &devices,
        "A dict a GPU: name, compute_capability, memory in bytes, multiprocessors.");
  m.def(
      "kernels", [] { return reinterpret_cast<uintptr_t>(&gossamer::kModule); },
      "The address of the tables of kernels that _C.attach_cuda takes.");
  m.def("driver_status", &driver_status, "What the driver says when asked for its devices.");
}
