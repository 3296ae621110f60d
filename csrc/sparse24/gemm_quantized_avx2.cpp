#include "common/simd_avx2.h"
#include "sparse24/gemm_quantized_kernels.h"

namespace gossamer::sparse24 {

const QuantizedUnit* quantized_unit_avx2(DType dtype) { return quantized_unit<Simd>(dtype); }

}  // namespace gossamer::sparse24
