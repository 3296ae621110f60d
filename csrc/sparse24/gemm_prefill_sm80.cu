// The 2:4 GEMM for many rows of a matrix x.
#include "sparse24/gemm_prefill_sm80.cuh"

namespace gossamer::sparse24 {
namespace {

// Rows of a matrix; those past the last one, and columns past k, are zeros.
struct MatrixRows {
  const char* x;
  int64_t stride, row_bytes, count;

  static constexpr bool kMaySplit = false;  // for that there is the decode kernel
  template <int kTileM>
  struct Shared {};

  __device__ void outputs(BlockTile& tile, unsigned index, int tile_n, int64_t n) const {
    tile.first_n = int64_t{index} * tile_n, tile.end_n = n;
  }

  template <int kTileM>
  class Loader {
   public:
    __device__ Loader(const MatrixRows& rows, const BlockTile& tile, Shared<kTileM>& /*shared*/,
                      int /*step*/)
        : rows_(rows), first_m_(tile.first_m) {}

    __device__ __forceinline__ void load(uint4* x, int step) {
      const PieceOfRow mine;
      const int64_t column = int64_t{step} * kPrefillStepBytes + mine.piece * 16;
      const auto valid =
          static_cast<int>(min(max(rows_.row_bytes - column, int64_t{0}), int64_t{16}));
#pragma unroll
      for (int i = 0; i < kTileM; i += PieceOfRow::kRows) {
        const int64_t m = first_m_ + i + mine.row;
        const bool is_inside = m < rows_.count && valid > 0;
        ptx::cp_async16(mine.place(x, i), rows_.x + (is_inside ? m * rows_.stride + column : 0),
                        is_inside ? valid : 0);
      }
    }

   private:
    const MatrixRows& rows_;
    int64_t first_m_;
  };
};

}  // namespace

void gemm_prefill_sm80(const CudaGemmArgs& args, cudaStream_t stream) {
  const int64_t size = size_of(args.dtype), tiles_n = ceil_div(args.n, kPrefillTileN);
  const MatrixRows x{static_cast<const char*>(args.x), args.x_stride * size, args.k * size, args.m};
  with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.config.tile_m == 128 ? launch_prefill<T, 2, 4>(args, x, tiles_n, stream)
                              : launch_prefill<T, 2, 8>(args, x, tiles_n, stream);
  });
}

}  // namespace gossamer::sparse24
