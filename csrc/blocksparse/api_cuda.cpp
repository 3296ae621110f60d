// The border of the product on a GPU.
#include <vector>

#include "blocksparse/api.h"
#include "common/check.h"

namespace py = pybind11;

namespace gossamer::blocksparse {
namespace {

// Kernels keep positions, pixels of an image and places of blocks in 32 bits.
constexpr double kMost = 0x7fffffff;

void check_reach(const char* op, const ConvShape& s, const Weight& w) {
  for (int axis = 0; axis < 3; ++axis) {
    const double farthest = static_cast<double>(s.out[axis] - 1) * s.stride[axis] +
                            static_cast<double>(s.kernel[axis] - 1) * s.dilation[axis];
    GOSSAMER_CHECK(farthest <= kMost, op, ": ", s.out[axis], " outputs with stride ",
                   s.stride[axis], " and a kernel of ", s.kernel[axis], " with dilation ",
                   s.dilation[axis], " reach further than a GPU's kernels count");
  }
  const double pixels = 1.0 * s.out[0] * s.out[1] * s.out[2];
  GOSSAMER_CHECK(pixels <= kMost && w.nnz <= kMost, op, ": ", s.out[0], " x ", s.out[1], " x ",
                 s.out[2], " outputs and ", w.nnz, " blocks, a GPU's kernels count to 2**31 - 1");
}

CudaConvConfig config_of(const char* op, const ConvShape& s, const Weight& w,
                         const CudaDevice& device) {
  check_reach(op, s, w);
  const CudaConvConfig config = choose_cuda_conv_config(s, w, device);
  const int64_t blocks = config.blocks(s.batch * s.out_pixels(), w);
  GOSSAMER_CHECK(blocks <= kMost, op, ": ", blocks, " thread blocks, CUDA has up to 2**31 - 1");
  return config;
}

template <class T>
std::vector<T> read(const CudaModule& module, const void* from, int64_t count,
                    const TensorView& near) {
  std::vector<T> host(static_cast<size_t>(count));
  if (count > 0) module.read(host.data(), from, host.size() * sizeof(T), stream_of(near));
  return host;
}

}  // namespace

const CudaKernels& cuda_kernels(const char* op, const TensorView& t) {
  return *cuda_module(op, t).blocksparse;
}

void conv_cuda(const char* op, const ConvArgs& args, const TensorView& x) {
  const CudaModule& module = cuda_module(op, x);
  GOSSAMER_CHECK(!args.weight.packed, op,
                 ": panels are what a CPU's kernels read, a GPU's read the blocks of BlockSparse");
  if (args.shape.batch * args.shape.out_pixels() == 0) return;
  const CudaDevice device = module.device(x.device_index);
  module.blocksparse->conv({args, config_of(op, args.shape, args.weight, device)}, stream_of(x));
}

void validate_cuda(const char* op, const Weight& weight, const TensorView& values) {
  const CudaModule& module = cuda_module(op, values);
  const auto crow = read<int32_t>(module, weight.crow_indices, weight.block_rows() + 1, values);
  const auto col = read<int32_t>(module, weight.col_indices, weight.nnz, values);
  Weight here = weight;
  here.crow_indices = crow.data(), here.col_indices = col.data();
  check_indices(here);
  if (weight.group_out % weight.rows == 0 && weight.group_in % weight.cols == 0) return;
  const auto blocks =
      read<char>(module, weight.values,
                 weight.nnz * weight.rows * weight.cols * size_of(weight.dtype), values);
  here.values = blocks.data();
  check_padding(here);
}

py::dict choose_cuda(const char* op, const ConvShape& s, const Weight& w,
                     const std::variant<int, py::dict>& device) {
  const CudaConvConfig config = config_of(op, s, w, device_of(op, device));
  py::dict report;
  report["target"] = "sm_80";
  report["kernel"] = name(config.kernel);
  report["why"] = config.kernel == CudaConvKernel::kMma
                      ? "tensor cores; x is read once for all outputs of a tile"
                      : "exact, which tensor cores are not";
  report["tile_pixels"] = config.tile_pixels();
  report["tile_outputs"] = config.tile_outputs();
  report["blocks"] = config.blocks(s.batch * s.out_pixels(), w);
  return report;
}

}  // namespace gossamer::blocksparse
