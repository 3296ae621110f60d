#pragma once
// What the files of the border share: weights made of checked tensors, and where they lie.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/border.h"
#include "common/conv_shape.h"
#include "common/cuda_border.h"
#include "sparse24/cuda.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

bool is_quantized_dtype(DType t);  // of values that come with scales
void check_size(const char* op, int64_t n, int64_t k);

// The portable weight [n, k] behind (values, indices), both checked against it; of values of any
// type, and of those in floating point.
Weight stored_weight(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                     int64_t k);
Weight portable(const char* op, const TensorView& values, const TensorView& indices, int64_t n,
                int64_t k);

// The weight [n, k] in the layout of the device that its panels are on.
Weight panels(const char* op, const TensorView& t, DType dtype, int64_t n, int64_t k);
std::vector<int64_t> panels_shape(bool on_gpu, int64_t n, int64_t k, DType dtype);
// TypeError where there are no panels of it.
DType panel_dtype(const std::string& dtype, bool or_quantized = false);

// The kernels for the tensor's GPU; ValueError where there are none.
const CudaKernels& cuda_kernels(const char* op, const TensorView& t);

// Asynchronous copies read x by 16 bytes.
void check_aligned_rows(const char* op, const TensorView& x);
// A kernel by name with tile_n, tile_m, warps_k, split_k and blocks (CudaGemmConfig).
using NamedConfig = std::tuple<std::string, int, int, int, int, int>;

// What there is to know of a way to cut a product up.
pybind11::dict report_of(const CudaGemmConfig& config, int64_t workspace_bytes);

// Chooses the kernel for a weight of `stored` values, unless one is given, and launches it on the
// stream of x, with what `args` says besides. Nothing to do without rows.
void launch_gemm(const char* op, CudaGemmArgs args, DType stored, const TensorView& x,
                 const std::optional<TensorView>& workspace,
                 const std::optional<TensorView>& counters,
                 const std::optional<NamedConfig>& config);

// The columns of a convolution's weight, of checked sizes.
int64_t conv_columns(const char* op, const ConvShape& s);

void bind_cuda(pybind11::module_& m);

}  // namespace gossamer::sparse24
