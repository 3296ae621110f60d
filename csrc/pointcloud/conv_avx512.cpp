#include "common/simd_avx512.h"
#include "pointcloud/weight_grad_kernels.h"

namespace gossamer::pointcloud {

const ConvUnit* conv_unit_avx512(DType dtype, const Channels& channels) {
  return float_unit<Simd>(dtype, channels);
}
const WeightGradUnit* weight_grad_unit_avx512(DType dtype, const Channels& channels) {
  return weight_grad_unit<Simd>(dtype, channels);
}

}  // namespace gossamer::pointcloud
