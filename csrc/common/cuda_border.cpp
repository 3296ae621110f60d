#include "common/cuda_border.h"

#include <pybind11/stl.h>

#include <atomic>
#include <utility>

#include "common/border.h"
#include "common/py_tensor.h"

namespace py = pybind11;

namespace gossamer {
namespace {

std::atomic<const CudaModule*> attached{nullptr};

// cp.async, and tensor cores that have sparse products, are there from here on.
constexpr int kLowestCapability = 80;

void check_capability(const char* op, const CudaDevice& device) {
  const int has = device.capability;
  GOSSAMER_CHECK(has >= kLowestCapability, op, ": a GPU of compute capability ", has / 10, ".",
                 has % 10, ", the kernels need ", kLowestCapability / 10, ".",
                 kLowestCapability % 10, " or newer");
}

}  // namespace

bool on_gpu(const TensorView& t) {
  if (t.device == Device::kCUDA) return true;
  const CudaModule* module = attached;
  return module != nullptr && module->host_memory;
}

const CudaModule& cuda_module(const char* op) {
  const CudaModule* module = attached;
  GOSSAMER_CHECK(module != nullptr, op,
                 ": the CUDA module is not loaded; python -m gossamer info says why");
  return *module;
}

const CudaModule& cuda_module(const char* op, const TensorView& t) {
  const CudaModule& module = cuda_module(op);
  GOSSAMER_CHECK(on_gpu(t), op, ": a tensor is on the CPU, this is a GPU's product");
  check_capability(op, module.device(t.device_index));
  return module;
}

CudaStream stream_of(const TensorView& t) { return {t.device_index, t.stream}; }

void check_grid(const char* op, int64_t blocks) {
  GOSSAMER_CHECK(blocks <= kMostCounted, op, ": ", blocks,
                 " thread blocks, CUDA has up to 2**31 - 1");
}

void check_gpu_dtype(const char* op, const char* what, DType dtype) {
  if (dtype == DType::kFloat64 || !is_weight_dtype(dtype)) {
    throw py::type_error(std::string(op) + ": " + what + " is " + name(dtype) +
                         ", a GPU has kernels of its own for float32, bfloat16 and float16");
  }
}

CudaWorkspace workspace_of(const char* op, int64_t bytes, int64_t counters,
                           const std::optional<TensorView>& given_workspace,
                           const std::optional<TensorView>& given_counters,
                           const TensorView& near) {
  if (bytes == 0) return {};
  GOSSAMER_CHECK(given_workspace && given_counters, op, ": ", bytes,
                 " bytes of workspace are needed");
  check_device(op, "workspace", *given_workspace, "the product", near);
  check_device(op, "counters", *given_counters, "the product", near);
  check_dtype(op, "counters", *given_counters, DType::kInt32);
  const int64_t given = given_workspace->numel() * size_of(given_workspace->dtype);
  GOSSAMER_CHECK(given >= bytes && given_counters->numel() >= counters, op, ": ", given,
                 " bytes of workspace and ", given_counters->numel(), " counters, expected ", bytes,
                 " and ", counters);
  return {given_workspace->data, given_counters->as<int32_t>()};
}

CudaDevice device_of(const char* op, const std::variant<int, py::dict>& device) {
  CudaDevice traits;
  if (const int* index = std::get_if<int>(&device)) {
    traits = cuda_module(op).device(*index);
  } else {
    const auto& description = std::get<py::dict>(device);
    traits = {description["capability"].cast<int>(), description["multiprocessors"].cast<int>(),
              description["shared_bytes"].cast<int64_t>(), description["l2_bytes"].cast<int64_t>()};
  }
  check_capability(op, traits);
  GOSSAMER_CHECK(traits.multiprocessors >= 1, op, ": a GPU with ", traits.multiprocessors,
                 " multiprocessors");
  return traits;
}

void bind_cuda(py::module_& m, size_t build) {
  m.attr("cuda_lowest_capability") = kLowestCapability;
  // The kernels live in the CUDA module, or 0: none from here on.
  m.def(
      "attach_cuda",
      [build](uintptr_t address) {
        const auto* module = reinterpret_cast<const CudaModule*>(address);
        GOSSAMER_CHECK(module == nullptr || module->build == build,
                       "gossamer: the CUDA module and the CPU module are not of one build; install "
                       "again");
        attached = module;
      },
      py::arg("module"));
  // The current stream of a CUDA tensor's device, and which graph capture it is in (0: none).
  m.def(
      "cuda_stream",
      [](const TensorView& t) {
        const uint64_t capture = cuda_module("cuda_stream").capture(stream_of(t));
        return std::pair(reinterpret_cast<uintptr_t>(t.stream), capture);
      },
      py::arg("tensor"));
  m.def("cuda_relax_capture", [] { cuda_module("cuda_relax_capture").relax_capture(); });
}

}  // namespace gossamer
