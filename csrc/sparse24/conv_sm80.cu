// 2:4 convolution: the GEMM for many rows of x, which are the pixels of y. A row is what a pixel
// sees of x, tap after tap the channels of a group, and is gathered while it is copied: nothing of
// it lies in memory. Where the pixels fill few tiles, blocks share each of them along K.
#include "common/conv_pixels.cuh"
#include "sparse24/conv_cuda.h"
#include "sparse24/gemm_prefill_sm80.cuh"

namespace gossamer::sparse24 {
namespace {

struct PixelRows {
  ConvPixels conv;
  const uint16_t* x;
  int taps, group_in;
  int64_t group_out;
  unsigned tiles_of_group;  // along the outputs

  static constexpr bool kMaySplit = true;
  template <int kTileM>
  struct Shared {
    SharedTile<Position, kTileM> positions;
    SharedTile<int64_t, kTileM> offsets;
  };

  __device__ void outputs(BlockTile& tile, unsigned index, int tile_n, int64_t /*n*/) const {
    tile.group = static_cast<int>(index / tiles_of_group);
    tile.first_n = tile.group * group_out + int64_t{index % tiles_of_group} * tile_n;
    tile.end_n = (tile.group + 1) * group_out;
  }

  // A piece is eight channels of one tap, which the channels of a group are a multiple of.
  template <int kTileM>
  class Loader {
   public:
    __device__ Loader(const PixelRows& rows, const BlockTile& tile, Shared<kTileM>& shared,
                      int step)
        : rows_(rows), shared_(shared), first_channel_(int64_t{tile.group} * rows.group_in) {
      for (int i = threadIdx.x; i < kTileM; i += kPrefillThreads) {
        shared.positions[i] = position_of(rows.conv, tile.first_m + i, shared.offsets.data() + i);
      }
      __syncthreads();
      channel_ = 8 * (step * kPieces + mine_.piece);
      move_on();
    }

    __device__ __forceinline__ void load(uint4* x, int /*step*/) {
      const int64_t offset = tap_.offset() + first_channel_ + channel_;
      unsigned inside = inside_;
#pragma unroll
      for (int i = 0; i < kTileM; i += PieceOfRow::kRows, inside >>= 1) {
        const bool there = inside & 1;
        const int64_t from = there ? shared_.offsets.data()[i + mine_.row] + offset : 0;
        ptx::cp_async16(mine_.place(x, i), rows_.x + from, there ? 16 : 0);
      }
      channel_ += 8 * kPieces;
      if (channel_ >= rows_.group_in) move_on();
    }

   private:
    // To the tap that the channel, counted from the first one of this tap, lies in.
    __device__ void move_on() {
      for (; channel_ >= rows_.group_in; ++number_) channel_ -= rows_.group_in;
      inside_ = 0;
      if (number_ >= rows_.taps) return;
      tap_.move_to(rows_.conv, number_);
#pragma unroll
      for (int i = 0; i < kTileM; i += PieceOfRow::kRows) {
        const bool seen = tap_.sees(rows_.conv, shared_.positions.data()[i + mine_.row]);
        inside_ |= static_cast<unsigned>(seen) << i / PieceOfRow::kRows;
      }
    }

    const PixelRows& rows_;
    Shared<kTileM>& shared_;
    int64_t first_channel_;  // of the group
    PieceOfRow mine_;
    Tap tap_;
    int number_ = 0, channel_;  // of the tap; of the piece in it
    unsigned inside_;           // in which of this thread's rows x has what the tap sees
  };
};

#ifdef __CUDACC__  // emulated, tiles are larger
template <int kWarpsN, int kTokenTiles>
constexpr bool kHasBytes = [] {
  using Tile = PrefillTile<kWarpsN, kTokenTiles, PixelRows>;
  return sizeof(typename Tile::Shared) == pixel_tile_shared_bytes(Tile::kN, Tile::kM);
}();
static_assert(kHasBytes<2, 4> && kHasBytes<1, 4> && kHasBytes<1, 2>);
#endif

template <class T>
void conv_by_tile(const CudaConvArgs& args, cudaStream_t stream) {
  const ConvShape& s = args.shape;
  const int tile_n = args.gemm.config.tile_n, tile_m = args.gemm.config.tile_m;
  const int64_t tiles_of_group = ceil_div(s.group_out(), tile_n);
  const PixelRows x{
      ConvPixels(s),
      static_cast<const uint16_t*>(args.gemm.x),
      static_cast<int>(s.taps()),
      static_cast<int>(s.group_in()),
      s.group_out(),
      static_cast<unsigned>(tiles_of_group),
  };
  const int64_t tiles_n = s.groups * tiles_of_group;
  if (tile_n == 128) return launch_prefill<T, 2, 4>(args.gemm, x, tiles_n, stream);
  tile_m == 256 ? launch_prefill<T, 1, 4>(args.gemm, x, tiles_n, stream)
                : launch_prefill<T, 1, 2>(args.gemm, x, tiles_n, stream);
}

}  // namespace

void conv_sm80(const CudaConvArgs& args, cudaStream_t stream) {
  args.gemm.dtype == DType::kFloat16 ? conv_by_tile<Float16>(args, stream)
                                     : conv_by_tile<BFloat16>(args, stream);
}

}  // namespace gossamer::sparse24
