#pragma once
// Where the border hands a call to the CUDA module. Included by api files only.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <variant>

#include "common/cuda.h"
#include "common/tensor_view.h"

namespace gossamer {

// Whether the CUDA module's kernels have to do it.
bool on_gpu(const TensorView& t);
// The attached module; ValueError where there is none,
const CudaModule& cuda_module(const char* op);
// or where the tensor is on no GPU, or on one too old for its kernels.
const CudaModule& cuda_module(const char* op, const TensorView& t);
CudaStream stream_of(const TensorView& t);

// What kernels count in 32 bits, and the thread blocks of a launch.
constexpr int64_t kMostCounted = 0x7fffffff;
void check_grid(const char* op, int64_t blocks);
// TypeError for float64, which a GPU has no kernels for, and for what is no weight's dtype.
void check_gpu_dtype(const char* op, const char* what, DType dtype);

// What blocks that share a tile meet in.
struct CudaWorkspace {
  void* sums = nullptr;
  int32_t* counters = nullptr;  // zeros, as they are left
};

// What is given, where it is on the device of `near` and holds that many bytes and counters;
// nothing where no bytes are needed.
CudaWorkspace workspace_of(const char* op, int64_t bytes, int64_t counters,
                           const std::optional<TensorView>& given_workspace,
                           const std::optional<TensorView>& given_counters, const TensorView& near);

// The device that a choice is asked for: one that is here, or a description of any other. A
// ValueError where it is too old.
CudaDevice device_of(const char* op, const std::variant<int, pybind11::dict>& device);

void bind_cuda(pybind11::module_& m, size_t build);

}  // namespace gossamer
