// The convolutions over voxels, the gradient of their weights and the kernels of maps, for the
// tests.
#include "cuda_build.h"
#include "kernels/exports.h"
#include "pointcloud/conv_sm80.cu"
#include "pointcloud/layout_cuda.h"
#include "pointcloud/maps_cuda.h"
#include "pointcloud/pool_cuda.h"
#include "pointcloud/voxelize_cuda.h"

namespace {

using namespace gossamer;

constexpr CudaDevice kDevice{80, 4, 227 << 10, 50 << 20};

const pointcloud::CudaKernels kMaps = [] {
  pointcloud::CudaKernels maps{};
  maps.number = [](const auto& window, const auto& rows, bool walkers, CudaStream) {
    pointcloud::number_rows(window, rows, walkers, nullptr);
  };
  maps.search = [](const auto& args, CudaStream) { pointcloud::search_pairs(args, nullptr); };
  maps.outputs = [](const auto& args, CudaStream) { pointcloud::find_outputs(args, nullptr); };
  maps.cells = [](const auto& args, CudaStream) { pointcloud::cells_of_keys(args, nullptr); };
  maps.mask_taps = [](const auto& pairs, void* masks, bool wide, CudaStream) {
    pointcloud::mask_taps(pairs, masks, wide, nullptr);
  };
  maps.group_outputs = [](const auto& pairs, const auto& groups, CudaStream) {
    pointcloud::group_outputs(pairs, groups, nullptr);
  };
  maps.fill_table = [](const auto& pairs, const auto& groups, const auto& table, CudaStream) {
    pointcloud::fill_table(pairs, groups, table, nullptr);
  };
  maps.rows_of_pairs = [](const auto& pairs, int32_t* in, int32_t* out, CudaStream) {
    pointcloud::rows_of_pairs(pairs, in, out, nullptr);
  };
  maps.list_pairs = [](const auto& listing, CudaStream) {
    pointcloud::list_pairs(listing, nullptr);
  };
  maps.pool = [](const auto& args, CudaStream) { pointcloud::pool_cuda(args, nullptr); };
  maps.quantize = [](const auto& points, int32_t* cells, int64_t* refused, CudaStream) {
    pointcloud::quantize_cuda(points, cells, refused, nullptr);
  };
  maps.cell_keys = [](const auto& args, CudaStream) { pointcloud::keys_of_cells(args, nullptr); };
  maps.inspect = [](const auto& args, CudaStream) { pointcloud::inspect_order(args, nullptr); };
  maps.voxels = [](const auto& args, CudaStream) { pointcloud::write_voxels(args, nullptr); };
  return maps;
}();

const CudaModule kModule = [] {
  CudaModule module{};
  module.build = build_of_cuda();
  module.host_memory = true;
  module.device = [](int) { return kDevice; };
  module.pointcloud = &kMaps;
  return module;
}();

}  // namespace

// What _C takes for the CUDA module, with the kernels of maps alone.
GOSSAMER_EXPORT int maps_module(int64_t* module, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] { *module = reinterpret_cast<int64_t>(&kModule); });
}

// sizes: taps, n_in, n_out, groups of positions, visits, C_in, C_out, the distance of rows of x,
// groups of channels.
// tile: of kConvTiles, or -1 for what the choice says.
GOSSAMER_EXPORT int conv(int64_t dtype, const int64_t* sizes, const int32_t* neighbours,
                         const int32_t* rows, const int32_t* begins, const int32_t* visited,
                         const void* x, const void* weights, const void* bias, int64_t activation,
                         void* y, int64_t tile, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    pointcloud::CudaConvArgs args{};
    args.dtype = static_cast<DType>(dtype);
    args.table = {sizes[0],   sizes[1], sizes[2], sizes[3], sizes[4],
                  neighbours, rows,     begins,   visited};
    args.c_in = sizes[5], args.c_out = sizes[6], args.x_stride = sizes[7], args.groups = sizes[8];
    args.x = x, args.weights = weights, args.bias = bias, args.y = y;
    args.activation = static_cast<Activation>(activation);
    args.config = pointcloud::choose_cuda_conv_config(args.dtype, sizes[3], sizes[6], kDevice);
    if (tile >= 0) args.config.tile = static_cast<int>(tile);
    if (args.groups > 1) args.config.kernel = pointcloud::CudaConvKernel::kGrouped;
    pointcloud::run_conv(args, nullptr);
  });
}

// sizes: taps, n_in, n_out, pairs, segments, C_in, C_out, the distances of rows of x and of dy,
// groups of channels.
GOSSAMER_EXPORT int weight_grad(int64_t dtype, const int64_t* sizes, const int32_t* in,
                                const int32_t* out, const int64_t* begins, const int64_t* of_tap,
                                const void* x, const void* dy, float* partial, void* dw, char* text,
                                int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    pointcloud::CudaWeightGradArgs args{};
    args.dtype = static_cast<DType>(dtype);
    args.map = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], in, out, begins, of_tap};
    args.c_in = sizes[5], args.c_out = sizes[6], args.x_stride = sizes[7];
    args.dy_stride = sizes[8], args.groups = sizes[9];
    args.x = x, args.dy = dy, args.partial = partial, args.dw = dw;
    pointcloud::weight_grad_cuda(args, nullptr);
  });
}
