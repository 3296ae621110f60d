#pragma once
// The border's part for GPUs.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "blocksparse/cuda.h"
#include "common/cuda_border.h"

namespace gossamer::blocksparse {

// The kernels for the tensor's GPU; ValueError where there are none.
const CudaKernels& cuda_kernels(const char* op, const TensorView& t);

// A way to compute a product: the kernel, a tile's pixels and outputs, the blocks of a cluster.
using NamedConfig = std::tuple<std::string, int, int, int>;

// Launches the kernel, one of ways_cuda or what the choice says, on the stream of x. Nothing to do
// without pixels.
void conv_cuda(const char* op, const ConvArgs& args, const TensorView& x,
               const std::optional<NamedConfig>& config);

// What check_indices and check_padding say of a weight in the memory of a GPU, which it waits for.
void validate_cuda(const char* op, const Weight& weight, const TensorView& values);

// All that this device has.
std::vector<NamedConfig> ways_cuda(const char* op, const ConvShape& shape, const Weight& weight,
                                   const std::variant<int, pybind11::dict>& device);

pybind11::dict choose_cuda(const char* op, const ConvShape& shape, const Weight& weight,
                           const std::variant<int, pybind11::dict>& device);

}  // namespace gossamer::blocksparse
