// int8 by VPDPBUSD: four products of bytes a lane, one unsigned and one signed, are added to its
// int32 sum. x is moved up by 128 to be unsigned.
#include "common/simd_avx512.h"
#include "sparse24/gemm_quantized_kernels.h"

namespace gossamer::sparse24 {
namespace {

struct ByVNNI {
  using I = Simd::I;
  static constexpr uint8_t kMoved = 0x80;
  I four;

  explicit ByVNNI(I weights) : four(weights) {}
  I added_to(I sum, I x) const { return _mm512_dpbusd_epi32(sum, x, four); }
};

}  // namespace

const QuantizedUnit* quantized_unit_avx512_vnni(DType dtype) {
  return dtype == DType::kInt8 ? &kQuantizedUnit<Simd, DotBytes<Simd, ByVNNI>>
                               : quantized_unit_avx512(dtype);
}

}  // namespace gossamer::sparse24
