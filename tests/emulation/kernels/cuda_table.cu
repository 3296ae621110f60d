// The tables that the CUDA module hands to _C, with emulated kernels: what _C then does with
// tensors in host memory is what it does with a GPU's.
#include "actsparse/linear_cuda.h"
#include "actsparse/topk_launch.h"
#include "blocksparse/conv_cuda.h"
#include "blocksparse/pack_cuda.h"
#include "cuda_build.h"
#include "grouped/gemm_cuda.h"
#include "kernels/exports.h"
#include "pointcloud/conv_cuda.h"
#include "pointcloud/layout_cuda.h"
#include "pointcloud/maps_cuda.h"
#include "pointcloud/pool_cuda.h"
#include "pointcloud/voxelize_cuda.h"
#include "sparse24/conv_cuda.h"
#include "sparse24/gemm_cuda.h"
#include "sparse24/pack_cuda.h"

namespace gossamer {
namespace {

CudaDevice described;
uint64_t capture_id = 0;
int last_kernel = -1;
int64_t active_launches = 0;  // of products that skip zero activations

cudaStream_t stream_of(CudaStream stream) { return static_cast<cudaStream_t>(stream.stream); }

}  // namespace

namespace actsparse {
namespace {

constexpr CudaKernels kKernels = {
    [](const CudaLinearArgs& args, CudaStream stream) {
      ++active_launches;
      linear_cuda(args, stream_of(stream));
    },
    [](const CudaOutputsArgs& args, CudaStream stream) {
      ++active_launches;
      outputs_cuda(args, stream_of(stream));
    },
};

}  // namespace
}  // namespace actsparse

namespace actsparse::topk {
namespace {

constexpr CudaKernels kKernels = {
    [](const CudaBags& args, CudaStream stream) { sum_bags_cuda(args, stream_of(stream)); },
    [](const CudaDots& args, CudaStream stream) { dot_rows_cuda(args, stream_of(stream)); },
    [](const CudaSelection& args, CudaStream stream) { select_cuda(args, stream_of(stream)); },
};

}  // namespace
}  // namespace actsparse::topk

namespace blocksparse {
namespace {

constexpr CudaKernels kKernels = {
    [](const CudaConvArgs& args, CudaStream stream) {
      last_kernel = static_cast<int>(args.config.kernel);
      run_conv(args, stream_of(stream));
    },
    [](const void* dense, const Weight& shape, uint8_t* live, CudaStream stream) {
      cuda::find_live(dense, shape, live, stream_of(stream));
    },
    [](const void* dense, const Weight& pattern, void* values, CudaStream stream) {
      cuda::gather(dense, pattern, values, stream_of(stream));
    },
    [](const Weight& weight, void* dense, CudaStream stream) {
      cuda::to_dense(weight, dense, stream_of(stream));
    },
};

}  // namespace
}  // namespace blocksparse

namespace grouped {
namespace {

constexpr CudaKernels kKernels = {
    [](const CudaGroupedArgs& args, CudaStream stream) {
      last_kernel = static_cast<int>(args.config.kernel);
      run_product(args, stream_of(stream));
    },
};

}  // namespace
}  // namespace grouped

namespace pointcloud {
namespace {

constexpr CudaKernels kKernels = {
    [](const CudaConvArgs& args, CudaStream stream) {
      last_kernel = static_cast<int>(args.config.kernel);
      run_conv(args, stream_of(stream));
    },
    [](const CudaWeightGradArgs& args, CudaStream stream) {
      weight_grad_cuda(args, stream_of(stream));
    },
    [](const WindowKeys& window, const NumberedRows& rows, bool walkers, CudaStream stream) {
      number_rows(window, rows, walkers, stream_of(stream));
    },
    [](const CudaSearchArgs& args, CudaStream stream) { search_pairs(args, stream_of(stream)); },
    [](const CudaOutputsArgs& args, CudaStream stream) { find_outputs(args, stream_of(stream)); },
    [](const CudaCells& args, CudaStream stream) { cells_of_keys(args, stream_of(stream)); },
    [](const CudaPairs& pairs, void* masks, bool wide, CudaStream stream) {
      mask_taps(pairs, masks, wide, stream_of(stream));
    },
    [](const CudaPairs& pairs, const CudaGroups& groups, CudaStream stream) {
      group_outputs(pairs, groups, stream_of(stream));
    },
    [](const CudaPairs& pairs, const CudaGroups& groups, const CudaTable& table,
       CudaStream stream) { fill_table(pairs, groups, table, stream_of(stream)); },
    [](const CudaPairs& pairs, int32_t* in_rows, int32_t* out_rows, CudaStream stream) {
      rows_of_pairs(pairs, in_rows, out_rows, stream_of(stream));
    },
    [](const CudaListing& listing, CudaStream stream) { list_pairs(listing, stream_of(stream)); },
    [](const CudaPoolArgs& args, CudaStream stream) { pool_cuda(args, stream_of(stream)); },
    [](const Points& points, int32_t* cells, int64_t* refused, CudaStream stream) {
      quantize_cuda(points, cells, refused, stream_of(stream));
    },
    [](const CudaCellKeys& args, CudaStream stream) { keys_of_cells(args, stream_of(stream)); },
    [](const CudaOrder& args, CudaStream stream) { inspect_order(args, stream_of(stream)); },
    [](const CudaVoxels& args, CudaStream stream) { write_voxels(args, stream_of(stream)); },
};

}  // namespace
}  // namespace pointcloud

namespace sparse24 {
namespace {

void gemm(const CudaGemmArgs& args, CudaStream stream) {
  last_kernel = static_cast<int>(args.config.kernel);
  run_gemm(args, stream_of(stream));
}

constexpr CudaKernels kKernels = {
    gemm,
    [](const CudaConvArgs& args, CudaStream stream) {
      last_kernel = static_cast<int>(args.gemm.config.kernel);
      run_conv(args, stream_of(stream));
    },
    [](const void* dense, const Weight& shape, void* values, uint8_t* indices, int64_t* status,
       CudaStream stream) {
      return cuda::from_dense(dense, shape, values, indices, status, stream_of(stream));
    },
    [](const void* dense, const Weight& pattern, void* values, CudaStream stream) {
      cuda::gather(dense, pattern, values, stream_of(stream));
    },
    [](const Weight& weight, void* dense, CudaStream stream) {
      cuda::to_dense(weight, dense, stream_of(stream));
    },
    [](const Weight& weight, int64_t* status, CudaStream stream) {
      return cuda::validate(weight, status, stream_of(stream));
    },
    [](const Weight& weight, uint32_t* panels, CudaStream stream) {
      cuda::to_panels(weight, panels, stream_of(stream));
    },
    [](const Weight& panels, void* values, uint8_t* indices, CudaStream stream) {
      cuda::from_panels(panels, values, indices, stream_of(stream));
    },
};

}  // namespace
}  // namespace sparse24

namespace {

constexpr CudaModule kModule = {
    build_of_cuda(),
    /*host_memory=*/true,
    [](int) { return described; },
    [](CudaStream) { return capture_id; },
    [] {},
    [](void* host, const void* from, size_t bytes, CudaStream stream) {
      copy_to_host(host, from, bytes, stream_of(stream));
    },
    &actsparse::kKernels,
    &blocksparse::kKernels,
    &grouped::kKernels,
    &pointcloud::kKernels,
    &sparse24::kKernels,
    &actsparse::topk::kKernels,
};

}  // namespace
}  // namespace gossamer

// The device that the kernels are chosen for, and the capture that its stream is in.
GOSSAMER_EXPORT int describe_device(int64_t capability, int64_t multiprocessors, int64_t capture,
                                    int64_t* table, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    described = {static_cast<int>(capability), static_cast<int>(multiprocessors), 227 << 10,
                 50 << 20};
    capture_id = static_cast<uint64_t>(capture);
    *table = reinterpret_cast<int64_t>(&kModule);
  });
}

GOSSAMER_EXPORT int kernel_that_ran(int64_t* kernel, char* text, int64_t text_bytes) {
  return gossamer::report(text, text_bytes, [&] { *kernel = gossamer::last_kernel; });
}

GOSSAMER_EXPORT int launches(int64_t* count, char* text, int64_t text_bytes) {
  return gossamer::report(text, text_bytes, [&] { *count = gossamer::active_launches; });
}
