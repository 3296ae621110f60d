// The kernels of k-sparse codes, for the tests.
#include "actsparse/topk_cuda.cu"
#include "kernels/exports.h"

namespace {

using namespace gossamer;
using namespace gossamer::actsparse;

topk::CudaCodes codes_of(const int64_t* sizes, const void* indices, const void* values) {
  return {sizes[0] * sizes[1], sizes[1], indices, sizes[2] != 0, values};
}

}  // namespace

// sizes: tokens, k, whether indices have 64 bits, bags, columns, rows of the matrix and their
// distance, whether a block's warps take a bag together.
GOSSAMER_EXPORT int sum_bags(int64_t dtype, const int64_t* sizes, const void* indices,
                             const void* values, const int64_t* begins, const int64_t* order,
                             const void* matrix, const void* bias, void* out, char* text,
                             int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    topk::sum_bags_cuda(
        {static_cast<DType>(dtype), sizes[3], sizes[4], codes_of(sizes, indices, values), begins,
         order, matrix, sizes[5], sizes[6], bias, out, sizes[7] != 0},
        nullptr);
  });
}

// sizes: tokens, k, whether indices have 64 bits, columns, the distance of rows of x, rows of the
// matrix and their distance.
GOSSAMER_EXPORT int dot_rows(int64_t dtype, const int64_t* sizes, const void* indices,
                             const void* x, const void* matrix, void* out, char* text,
                             int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    topk::dot_rows_cuda({static_cast<DType>(dtype), sizes[3], codes_of(sizes, indices, nullptr), x,
                         sizes[4], matrix, sizes[5], sizes[6], out},
                        nullptr);
  });
}

GOSSAMER_EXPORT int select_largest(int64_t dtype, int64_t rows, int64_t width, int64_t k,
                                   const void* dense, int64_t relu, void* values, int64_t* indices,
                                   char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    topk::select_cuda(
        {static_cast<DType>(dtype), rows, width, k, dense, relu != 0, values, indices, 60 << 10},
        nullptr);
  });
}
