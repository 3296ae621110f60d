#pragma once
// Which kernel computes a 2:4 convolution on a GPU: a pure function of shape, dtype and device,
// tested without one.
#include "common/conv_shape.h"
#include "sparse24/choose_gemm_cuda.h"

namespace gossamer::sparse24 {

// matrix: each pixel of y sees one of x, whose pixels are the rows of a GEMM.
// pixels: rows are gathered while they are copied.
// dense:  torch's convolution with the dense weight.
enum class ConvWay : uint8_t { kMatrix, kPixels, kDense };

struct CudaConvChoice {
  ConvWay way;
  CudaGemmConfig config;
  const char* why;
  bool pays = false;  // with many pixels, against torch's, by arithmetic
};

// The product that a convolution is.
struct ConvProduct {
  int64_t m, n, k;

  explicit ConvProduct(const ConvShape& s)
      : m(s.batch * s.out_pixels()), n(s.out_channels), k(s.taps() * s.group_in()) {}
};

// ---- mma.sp -------------------------------------------------------------------------------------

struct PixelTile {
  int n, m;     // outputs, pixels
  double cost;  // of a stage, against its share of the largest tile's
};
// With a warp's 64 x 16 sums, weights are read from shared memory twice as often as with 64 x 32.
constexpr PixelTile kPixelTiles[] = {{128, 128, 1.0}, {64, 256, 1.0}, {64, 128, 1.25}};

constexpr int64_t pixel_tile_shared_bytes(int tile_n, int tile_m) {
  const int64_t stage = (int64_t{tile_m} + tile_n / 2) * kPrefillStepBytes;
  return kPrefillStages * stage + int64_t{tile_m} * 24;  // where pixels lie
}

inline int64_t pixel_tiles(const ConvShape& s, int tile_n, int tile_m) {
  return s.groups * ceil_div(s.group_out(), tile_n) * ceil_div(s.batch * s.out_pixels(), tile_m);
}

// Of sums that meet: [tile][block][tile_n x tile_m].
inline int64_t pixel_workspace_bytes(const CudaGemmConfig& c, const ConvShape& s) {
  return c.split_k == 1 ? 0
                        : pixel_tiles(s, c.tile_n, c.tile_m) * c.split_k * c.tile_n * c.tile_m * 4;
}

constexpr int64_t kMaxPixelTiles = int64_t{1} << 28;  // 8 times that is counted in 32 bits

// A model of the time, in cycles of a multiprocessor, by arithmetic: no GPU has run the kernel yet.
struct PixelModel {
  static constexpr double kStage = 850;     // of the largest tile, at 0.6 of an A100's mma.sp
  static constexpr double kBlock = 2500;    // to find its pixels, fill the pipeline and store
  static constexpr double kMeeting = 6000;  // as in DecodeModel: a fence, an atomic, loads
  static constexpr double kL2Bytes = 40;    // a cycle

  const ConvShape& s;
  const CudaDevice& device;

  int64_t records() const { return ceil_div(ConvProduct(s).k, kFragmentColumns); }

  double cost(const PixelTile& tile, int split_k) const {
    const auto rounds = static_cast<double>(
        ceil_div(pixel_tiles(s, tile.n, tile.m) * split_k, device.multiprocessors));
    const double area = static_cast<double>(tile.n) * tile.m;
    const double stage = kStage * tile.cost * area / (128 * 128);
    const auto depth = static_cast<double>(ceil_div(records(), split_k) * kFragmentColumns * 2 /
                                           kPrefillStepBytes);
    const double meeting = split_k == 1 ? 0 : kMeeting + (split_k + 1) * 4 * area / kL2Bytes;
    return rounds * (depth * stage + kBlock) + meeting;
  }
};

// Whole tiles, and tiles that so many blocks share that they fill the multiprocessors once or
// twice.
template <class Consider>
void for_each_pixel_tile(const ConvShape& s, const CudaDevice& device, const Consider& consider) {
  const int64_t records = PixelModel{s, device}.records();
  for (const PixelTile& tile : kPixelTiles) {
    const int64_t tiles = pixel_tiles(s, tile.n, tile.m);
    const int64_t shared = pixel_tile_shared_bytes(tile.n, tile.m);
    if (shared > device.shared_bytes || tiles > kMaxPixelTiles) continue;
    int64_t last = 0;
    for (int fill = 0; fill <= 2; ++fill) {
      const int64_t wanted = int64_t{fill} * device.multiprocessors / tiles;
      const int64_t split_k = std::clamp<int64_t>(wanted, 1, records);
      const CudaGemmConfig config{CudaKernel::kPrefill, tile.n, tile.m, 1,
                                  static_cast<int>(split_k)};
      const bool meets = split_k > 1;
      if (split_k == last || (meets && (tiles > kCudaCounters ||
                                        pixel_workspace_bytes(config, s) > kMaxWorkspaceBytes))) {
        continue;
      }
      last = split_k;
      consider(tile, config);
    }
  }
}

// What the kernel counts in 32 bits: how far a window reaches, and the pixels of an image.
inline bool is_countable(const ConvShape& s) {
  constexpr double kMost = 0x7fffffff;
  bool all = s.out_pixels() <= 0x7fffffff;
  for (int axis = 0; axis < 3; ++axis) {
    all = all && s.reach(axis) <= kMost;
  }
  return all;
}

inline bool can_run_pixels_sm80(const ConvShape& s) {
  return s.group_in() % 8 == 0 && (s.groups == 1 || s.group_out() % kFragmentRows == 0) &&
         is_countable(s);
}

// ---- wgmma.sp (Hopper) --------------------------------------------------------------------------

// Of a tensor map in im2col mode, where the last window begins, from the end of x on.
inline int64_t im2col_upper(const ConvShape& s, int axis) {
  return (s.out[axis] - 1) * s.stride[axis] - s.padding[axis] - (s.in[axis] - 1);
}

// Whether im2col mode has the bits for it, which are few.
inline bool im2col_fits(const ConvShape& s, int axis) {
  const int64_t upper = im2col_upper(s, axis);
  return s.padding[axis] <= 128 && upper >= -128 && upper <= 127 && s.stride[axis] <= 8 &&
         (s.kernel[axis] - 1) * s.dilation[axis] <= 255;
}

constexpr int64_t kMaxRows = int64_t{1} << 30;  // of x, of W and of columns, on Hopper

// A step of the GEMM lies in one tap, and the first axis is one of images.
inline bool can_run_pixels_sm90(const ConvShape& s) {
  const ConvProduct of(s);
  const bool is_flat = s.kernel[0] == 1 && s.stride[0] == 1 && s.padding[0] == 0;
  return s.groups == 1 && s.batch * s.in_pixels() > 0 &&
         s.in_channels % (kPrefillStepBytes / 2) == 0 && is_flat && s.in[0] == s.out[0] &&
         im2col_fits(s, 1) && im2col_fits(s, 2) && s.in_pixels() * s.batch <= kMaxRows &&
         of.m <= kMaxRows && of.n <= kMaxRows && of.k <= kMaxRows;
}

// Of a way to gather the pixels.
inline int64_t conv_workspace_bytes(const CudaGemmConfig& config, const ConvShape& s) {
  const ConvProduct of(s);
  return config.kernel == CudaKernel::kPrefill ? pixel_workspace_bytes(config, s)
                                               : config.workspace_bytes(of.m, of.n);
}

// ---- the choice ---------------------------------------------------------------------------------

// Calls consider(config) for every way to gather the pixels.
template <class Consider>
void for_each_pixel_way(const ConvShape& s, DType dtype, const CudaDevice& device,
                        const Consider& consider) {
  if (size_of(dtype) != 2) return;
  if (can_run_pixels_sm80(s)) {
    for_each_pixel_tile(s, device,
                        [&](const PixelTile&, const CudaGemmConfig& config) { consider(config); });
  }
  if (device.capability == 90 && can_run_pixels_sm90(s)) {
    const ConvProduct of(s);
    for_each_hopper_way(of.m, of.n, of.k, dtype, device, consider);
  }
}

// A tile whose outputs are mostly not there costs as much as a full one.
inline bool fills(int64_t outputs, int tile_n) {
  return 4 * outputs >= 3 * ceil_div(outputs, tile_n) * tile_n;
}

// Of a product that has pixels, outputs and channels.
inline CudaConvChoice choose_cuda_conv(const ConvShape& s, DType dtype, const CudaDevice& device) {
  const auto dense = [](const char* why) { return CudaConvChoice{ConvWay::kDense, {}, why}; };
  const ConvProduct of(s);
  if (size_of(dtype) != 2) return dense("tensor cores have no exact sparse product of it");
  if (!can_run_pixels_sm80(s)) {
    return dense(
        "a group's channels are no multiple of 8, its outputs none of 16, or indices pass 32 bits");
  }
  const bool hopper = device.capability == 90;
  if (s.is_pointwise() && s.groups == 1 && of.m <= kMaxRows) {
    const CudaGemmConfig config = choose_cuda_gemm_config(of.m, of.n, of.k, dtype, device);
    // Of few outputs there are smaller tiles below.
    const bool is_large = config.kernel == CudaKernel::kPrefill && !fills(of.n, config.tile_n);
    if (!is_large) {
      return {ConvWay::kMatrix, config, "each pixel sees itself: a GEMM",
              !hopper || fills(of.n, kPrefillTileN)};
    }
  }
  if (hopper && can_run_pixels_sm90(s)) {
    const CudaGemmConfig config = hopper_config(of.m, of.n, of.k, dtype, device);
    if (config.tile_n != 0) {
      return {ConvWay::kPixels, config, "an implicit GEMM by wgmma.sp; TMA gathers the pixels",
              fills(of.n, config.tile_n)};
    }
  }
  CudaConvChoice best = dense("more tiles than a grid has blocks");
  const PixelModel model{s, device};
  double least = 0;
  for_each_pixel_tile(s, device, [&](const PixelTile& tile, const CudaGemmConfig& config) {
    const double cost = model.cost(tile, config.split_k);
    if (best.way != ConvWay::kDense && cost >= least) return;
    // An H200 ran mma.sp at 0.6x of dense wgmma.
    best = {ConvWay::kPixels, config, "an implicit GEMM by mma.sp; pixels are gathered",
            !hopper && fills(s.group_out(), tile.n)};
    least = cost;
  });
  return best;
}

}  // namespace gossamer::sparse24
