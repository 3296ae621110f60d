// The table of this feature's kernels, each on the device of its tensors.
#include "pointcloud/cuda_kernels.h"

#include "common/device.cuh"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/layout_cuda.h"
#include "pointcloud/maps_cuda.h"
#include "pointcloud/pool_cuda.h"
#include "pointcloud/voxelize_cuda.h"

namespace gossamer::pointcloud {
namespace {

void conv(const CudaConvArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { run_conv(args, s); });
}

void weight_grad(const CudaWeightGradArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { weight_grad_cuda(args, s); });
}

void number(const WindowKeys& window, const NumberedRows& rows, bool walkers, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { number_rows(window, rows, walkers, s); });
}

void search(const CudaSearchArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { search_pairs(args, s); });
}

void outputs(const CudaOutputsArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { find_outputs(args, s); });
}

void cells(const CudaCells& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { cells_of_keys(args, s); });
}

void masks(const CudaPairs& pairs, void* masks, bool wide, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { mask_taps(pairs, masks, wide, s); });
}

void groups(const CudaPairs& pairs, const CudaGroups& groups, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { group_outputs(pairs, groups, s); });
}

void table(const CudaPairs& pairs, const CudaGroups& groups, const CudaTable& table,
           CudaStream stream) {
  on(stream, [&](cudaStream_t s) { fill_table(pairs, groups, table, s); });
}

void pair_rows(const CudaPairs& pairs, int32_t* in_rows, int32_t* out_rows, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { rows_of_pairs(pairs, in_rows, out_rows, s); });
}

void lists(const CudaListing& listing, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { list_pairs(listing, s); });
}

void pool(const CudaPoolArgs& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { pool_cuda(args, s); });
}

void cells_of_points(const Points& points, int32_t* cells, int64_t* refused, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { quantize_cuda(points, cells, refused, s); });
}

void cell_keys(const CudaCellKeys& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { keys_of_cells(args, s); });
}

void inspect(const CudaOrder& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { inspect_order(args, s); });
}

void voxels(const CudaVoxels& args, CudaStream stream) {
  on(stream, [&](cudaStream_t s) { write_voxels(args, s); });
}

constexpr CudaKernels kKernels = {
    conv,  weight_grad, number, search, outputs,         cells,     masks,   groups,
    table, pair_rows,   lists,  pool,   cells_of_points, cell_keys, inspect, voxels};

}  // namespace

const CudaKernels* cuda_kernel_table() { return &kKernels; }

}  // namespace gossamer::pointcloud
