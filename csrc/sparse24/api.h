#pragma once
// What the files of the border share: weights made of checked tensors, and where they lie.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "common/border.h"
#include "sparse24/cuda.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

bool is_weight_dtype(DType t);
void check_size(const char* op, int64_t n, int64_t k);

// The portable weight [n, k] behind (values, indices), both checked against it.
Weight portable(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                int64_t k);

// The weight [n, k] in the layout of the device that its panels are on.
Weight panels(const char* op, const TensorView& t, DType dtype, int64_t n, int64_t k);
std::vector<int64_t> panels_shape(bool on_gpu, int64_t n, int64_t k, DType dtype);
DType panel_dtype(const std::string& dtype);

Activation activation_of(const char* op, const std::string& text);
// [n] of this dtype on the device of x, or null where there is none.
const void* bias_of(const char* op, const std::optional<TensorView>& bias, int64_t n, DType dtype,
                    const TensorView& x);

// Whether the CUDA module's kernels have to do it, and those kernels; ValueError where the module
// is not attached or the tensor's GPU is too old.
bool on_gpu(const TensorView& t);
const CudaKernels& cuda_kernels(const char* op, const TensorView& t);
CudaStream stream_of(const TensorView& t);

void bind_cuda(pybind11::module_& m);

}  // namespace gossamer::sparse24
