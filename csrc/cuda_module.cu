// The CUDA half of gossamer: its kernels, handed to _C as a table, and which devices are here. It
// links cudart statically and loads on machines without a GPU or a driver, where it answers that
// there is none.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "sparse24/cuda_kernels.h"

namespace py = pybind11;

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
      "sparse24_kernels",
      [] { return reinterpret_cast<uintptr_t>(gossamer::sparse24::cuda_kernel_table()); },
      "The address of the table of kernels that _C.sparse24_attach_cuda takes.");
  m.def("driver_status", &driver_status, "What the driver says when asked for its devices.");
}
