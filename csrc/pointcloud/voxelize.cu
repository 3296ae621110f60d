// Points to voxels on a GPU, and what a sort of coordinates needs before and after.
//
//   quantize   the cell of each point, and the first point that has none
//   keys       a number for each row, for torch to sort
//   inspect    whether sorted rows repeat, and whether they were in order before
//   voxels     coordinates and first ranks of the runs of equal keys
//
// Each is a thread a row, and bound by its bytes: by arithmetic 2 to 4 us for 100,000 points.
// Counts and least rows are gathered by atomics on integers, which any order of blocks leaves the
// same.
#include "common/ceil_div.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "pointcloud/voxelize_cuda.h"

namespace gossamer::pointcloud {
namespace {

constexpr int kThreads = 256;
using Count = unsigned long long;

__device__ __forceinline__ int64_t my_row() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

template <class Real>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const Points points, int32_t* cells, Count* refused) {
  const int64_t i = my_row();
  if (i >= points.count) return;
  const Real* position = static_cast<const Real*>(points.positions) + i * points.axes;
  int32_t* to = cells + i * (points.axes + 1);
  to[0] = points.batch == nullptr ? 0 : points.batch[i];
#pragma unroll
  for (int a = 0; a < kMostColumns - 1; ++a) {
    if (a == points.axes) break;
    const double cell = floor(static_cast<double>(position[a]) / points.size[a]);
    const bool there = cell >= INT32_MIN && cell <= INT32_MAX;  // not where it is NaN
    if (!there) atomicMax(refused, static_cast<Count>(points.count - i));
    to[a + 1] = there ? static_cast<int32_t>(cell) : 0;
  }
}

__global__ void __launch_bounds__(kThreads) keys_kernel(const CudaCellKeys args) {
  const int64_t i = my_row();
  if (i >= args.count) return;
  uint64_t key = 0;
#pragma unroll
  for (int c = 0; c < kMostColumns; ++c) {
    if (c == args.columns) break;
    key += static_cast<uint64_t>(args.coords[i * args.columns + c] - args.low[c]) * args.step[c];
  }
  args.keys[i] = static_cast<int64_t>(key ^ uint64_t{1} << 63);
}

__global__ void __launch_bounds__(kThreads) inspect_kernel(const CudaOrder args) {
  const int64_t rank = my_row();
  bool repeats = false, descends = false;
  int64_t row = 0;
  if (rank < args.count) {
    row = args.order[rank];
    args.rows[rank] = static_cast<int32_t>(row);
    if (rank > 0) {
      repeats = args.keys[rank] == args.keys[rank - 1];
      descends = row <= args.order[rank - 1];
    }
  }
  auto* found = reinterpret_cast<Count*>(args.found);
  const uint32_t repeated = __ballot_sync(kAllLanes, repeats);
  const uint32_t descended = __ballot_sync(kAllLanes, descends);
  if (threadIdx.x % kWarp == 0) {
    if (repeated != 0) atomicAdd(&found[0], static_cast<Count>(__popc(repeated)));
    if (descended != 0) atomicAdd(&found[2], static_cast<Count>(__popc(descended)));
  }
  if (repeats) atomicMax(&found[1], static_cast<Count>(args.count - row));
}

__global__ void __launch_bounds__(kThreads) voxels_kernel(const CudaVoxels args) {
  const int64_t rank = my_row();
  if (rank >= args.points) return;
  const int64_t voxel = args.voxels_to[rank], row = args.order[rank];
  if (static_cast<uint64_t>(voxel) >= static_cast<uint64_t>(args.voxels) ||
      static_cast<uint64_t>(row) >= static_cast<uint64_t>(args.points)) {
    return;
  }
  args.of_point[row] = voxel;
  args.rows[rank] = static_cast<int32_t>(row);
  if (rank + 1 == args.points) args.begins[args.voxels] = args.points;
  if (rank > 0 && args.voxels_to[rank - 1] == voxel) return;
  args.begins[voxel] = rank;
  for (int c = 0; c < args.columns; ++c) {
    args.coords[voxel * args.columns + c] = args.cells[row * args.columns + c];
  }
}

unsigned blocks_for(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kThreads)); }

}  // namespace

void quantize_cuda(const Points& points, int32_t* cells, int64_t* refused, cudaStream_t stream) {
  fill_zero(refused, sizeof(int64_t), stream);
  if (points.count == 0) return;
  launch(points.dtype == DType::kFloat64 ? quantize_kernel<double> : quantize_kernel<float>,
         blocks_for(points.count), kThreads, 0, stream, points, cells,
         reinterpret_cast<Count*>(refused));
}

void keys_of_cells(const CudaCellKeys& args, cudaStream_t stream) {
  if (args.count == 0) return;
  launch(keys_kernel, blocks_for(args.count), kThreads, 0, stream, args);
}

void inspect_order(const CudaOrder& args, cudaStream_t stream) {
  fill_zero(args.found, 3 * sizeof(int64_t), stream);
  if (args.count == 0) return;
  launch(inspect_kernel, blocks_for(args.count), kThreads, 0, stream, args);
}

void write_voxels(const CudaVoxels& args, cudaStream_t stream) {
  if (args.points == 0) return;
  launch(voxels_kernel, blocks_for(args.points), kThreads, 0, stream, args);
}

}  // namespace gossamer::pointcloud
