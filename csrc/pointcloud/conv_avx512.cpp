#include "common/simd_avx512.h"
#include "pointcloud/conv_kernels.h"

namespace gossamer::pointcloud {

const ConvUnit* conv_unit_avx512(DType dtype, const Channels& channels) {
  return float_unit<Simd>(dtype, channels);
}

}  // namespace gossamer::pointcloud
