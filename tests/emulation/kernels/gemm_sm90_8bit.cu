// One kernel for each 8-bit type and way out, for test_sass.py: all of them take minutes to
// compile.
#include "sparse24/gemm_sm90.cuh"

namespace gossamer::sparse24 {
namespace {

template __global__ void sparse24_gemm<E4M3, 2, 128>(const __grid_constant__ Args args);
template __global__ void sparse24_gemm<int8_t, 1, 256>(const __grid_constant__ Args args);

}  // namespace
}  // namespace gossamer::sparse24
