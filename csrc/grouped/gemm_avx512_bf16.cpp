// bfloat16 by VDPBF16PS: a lane's two products are added to its float32 sum at once. Subnormals
// count as zero (the instruction's definition).
#include "common/simd_avx512.h"
#include "grouped/gemm_kernels.h"

namespace gossamer::grouped {
namespace {

struct DotBF16 {
  using F = Simd::F;
  static constexpr int kRegisters = 1, kColumns = 2 * Simd::kLanes;
  template <int>
  static F load(const BFloat16* p) {
    return Simd::as_float(Simd::load_words(reinterpret_cast<const uint32_t*>(p)));
  }
  static F add(F w, F x, F sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)Simd::as_int(w), (__m512bh)Simd::as_int(x));
  }
};

}  // namespace

const Unit* unit_avx512_bf16(DType dtype) {
  if (dtype != DType::kBFloat16) return unit_avx512(dtype);
  return &Dot<Simd, BFloat16, DotBF16>::unit;
}

}  // namespace gossamer::grouped
