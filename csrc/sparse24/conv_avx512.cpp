#include "common/simd_avx512.h"
#include "sparse24/conv_kernels.h"

namespace gossamer::sparse24 {

void pairs_avx512(const PairsTask& task) { Pairs<Simd>::run(task); }

}  // namespace gossamer::sparse24
