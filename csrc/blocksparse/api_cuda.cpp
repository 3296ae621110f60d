// The border of the product on a GPU.
#include <optional>
#include <vector>

#include "blocksparse/api.h"
#include "common/check.h"

namespace py = pybind11;

namespace gossamer::blocksparse {
namespace {

NamedConfig name_of(const CudaConvConfig& config) {
  return {name(config.kernel), config.tile_pixels(), config.tile_outputs(), config.cluster()};
}

// Kernels keep positions, pixels of an image and places of blocks in 32 bits.
void check_reach(const char* op, const ConvShape& s, const Weight& w) {
  for (int axis = 0; axis < 3; ++axis) {
    GOSSAMER_CHECK(s.reach(axis) <= kMostCounted, op, ": ", s.out[axis], " outputs with stride ",
                   s.stride[axis], " and a kernel of ", s.kernel[axis], " with dilation ",
                   s.dilation[axis], " reach further than a GPU's kernels count");
  }
  const double pixels = 1.0 * s.out[0] * s.out[1] * s.out[2];
  GOSSAMER_CHECK(pixels <= kMostCounted && w.nnz <= kMostCounted, op, ": ", s.out[0], " x ",
                 s.out[1], " x ", s.out[2], " outputs and ", w.nnz,
                 " blocks, a GPU's kernels count to 2**31 - 1");
}

CudaConvConfig named(const char* op, const ConvShape& s, const Weight& w, const CudaDevice& device,
                     const NamedConfig& given) {
  std::optional<CudaConvConfig> found;
  for_each_way(s, w, device, [&](const CudaConvConfig& config) {
    if (name_of(config) == given) found = config;
  });
  const auto& [kernel, pixels, outputs, cluster] = given;
  GOSSAMER_CHECK(found, op, ": no kernel computes this product as ", kernel, " ", pixels, " x ",
                 outputs, " in clusters of ", cluster);
  return *found;
}

CudaConvConfig config_of(const char* op, const ConvShape& s, const Weight& w,
                         const CudaDevice& device, bool aligned = true,
                         const std::optional<NamedConfig>& given = {}) {
  check_reach(op, s, w);
  const CudaConvConfig config =
      given ? named(op, s, w, device, *given) : choose_cuda_conv_config(s, w, device, aligned);
  check_grid(op, config.blocks(s.batch * s.out_pixels(), w));
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

void conv_cuda(const char* op, const ConvArgs& args, const TensorView& x,
               const std::optional<NamedConfig>& config) {
  const CudaModule& module = cuda_module(op, x);
  GOSSAMER_CHECK(!args.weight.packed, op,
                 ": panels are what a CPU's kernels read, a GPU's read the blocks of BlockSparse");
  if (args.shape.batch * args.shape.out_pixels() == 0) return;
  const CudaDevice device = module.device(x.device_index);
  const bool aligned = begins_at_16_bytes(args.x) && begins_at_16_bytes(args.weight.values);
  const CudaConvConfig chosen = config_of(op, args.shape, args.weight, device, aligned, config);
  GOSSAMER_CHECK(chosen.kernel != CudaConvKernel::kWgmma || aligned, op,
                 ": the Hopper kernel takes x and values that begin at multiples of 16 bytes");
  module.blocksparse->conv({args, chosen}, stream_of(x));
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
  report["target"] = config.kernel == CudaConvKernel::kWgmma ? "sm_90" : "sm_80";
  report["kernel"] = name(config.kernel);
  report["why"] = config.kernel == CudaConvKernel::kFma
                      ? "exact, which tensor cores are not"
                      : "tensor cores; x is read once for all outputs of a tile";
  report["tile_pixels"] = config.tile_pixels();
  report["tile_outputs"] = config.tile_outputs();
  report["cluster"] = config.cluster();
  report["blocks"] = config.blocks(s.batch * s.out_pixels(), w);
  return report;
}

std::vector<NamedConfig> ways_cuda(const char* op, const ConvShape& s, const Weight& w,
                                   const std::variant<int, py::dict>& device) {
  std::vector<NamedConfig> ways;
  for_each_way(s, w, device_of(op, device),
               [&](const CudaConvConfig& config) { ways.push_back(name_of(config)); });
  return ways;
}

}  // namespace gossamer::blocksparse
