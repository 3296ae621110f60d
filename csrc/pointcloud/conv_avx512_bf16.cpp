// bfloat16 by VDPBF16PS: a word is two channels, whose products are added to a float32 sum at once.
// Subnormals count as zero (the instruction's definition).
#include "common/simd_avx512.h"
#include "pointcloud/conv_kernels.h"

namespace gossamer::pointcloud {
namespace {

struct PairWords {
  using F = Simd::F;
  static constexpr int kChannels = 2;
  static void gather(const BFloat16* x, int64_t count, const BFloat16*, float* to) {
    for (int64_t c = 0; c < count; c += 2 * Simd::kLanes) {
      const int64_t rest = count - c < 32 ? count - c : 32;
      const auto mask = static_cast<__mmask32>(~uint64_t{0} >> (64 - rest));
      _mm512_storeu_si512(to + c / 2, _mm512_maskz_loadu_epi16(mask, x + c));
    }
  }
  static float word(const BFloat16* w, int64_t stride, int64_t count) {
    const BFloat16 second = count > 1 ? w[stride] : BFloat16{0};
    return bits_to_float(w->bits | static_cast<uint32_t>(second.bits) << 16);
  }
  static F add(F w, F x, F sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)Simd::as_int(w), (__m512bh)Simd::as_int(x));
  }
};

}  // namespace

const ConvUnit* conv_unit_avx512_bf16(DType dtype, const Channels& channels) {
  if (dtype != DType::kBFloat16 || channels.depthwise()) return conv_unit_avx512(dtype, channels);
  return &Gather<Simd, BFloat16, PairWords>::unit;
}

}  // namespace gossamer::pointcloud
