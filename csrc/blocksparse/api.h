#pragma once
// The border's part for GPUs.
#include <pybind11/pybind11.h>

#include <variant>

#include "blocksparse/cuda.h"
#include "common/cuda_border.h"

namespace gossamer::blocksparse {

// The kernels for the tensor's GPU; ValueError where there are none.
const CudaKernels& cuda_kernels(const char* op, const TensorView& t);

// Chooses the kernel and launches it on the stream of x. Nothing to do without pixels.
void conv_cuda(const char* op, const ConvArgs& args, const TensorView& x);

// What check_indices and check_padding say of a weight in the memory of a GPU, which it waits for.
void validate_cuda(const char* op, const Weight& weight, const TensorView& values);

pybind11::dict choose_cuda(const char* op, const ConvShape& shape, const Weight& weight,
                           const std::variant<int, pybind11::dict>& device);

}  // namespace gossamer::blocksparse
