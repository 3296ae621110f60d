#pragma once
// The k-sparse kernels for NVIDIA GPUs: what _C, which checks and decides, hands to the CUDA
// module. The names are those of topk.h.
//
// Nobody reads indices back at a call, which would have to wait for the GPU: a pair whose index is
// outside the matrix counts as NaN, and the kernels stay within their memory whatever is said.
#include "common/cuda.h"
#include "common/dtype.h"

namespace gossamer::actsparse::topk {

// Where the codes [tokens, k] lie.
struct CudaCodes {
  int64_t pairs, k;     // pairs = tokens * k
  const void* indices;  // [pairs] int32 or, where `wide`, int64
  bool wide;
  const void* values;  // [pairs] of the dtype
};

// out[bag] = sum of its pairs' value * matrix[row] (+ bias).
struct CudaBags {
  DType dtype;  // float32, bfloat16, float16
  int64_t bags, columns;
  CudaCodes codes;
  // Null: a bag is a token, and a pair's row its index. Otherwise begins [bags + 1] says which of
  // `order` [pairs], numbers of pairs, belong to a bag, and a pair's row is its token.
  const int64_t *begins, *order;
  const void* matrix;  // [matrix_rows, columns], its rows `stride` elements apart
  int64_t matrix_rows, stride;
  const void* bias;  // [columns] or null
  void* out;         // [bags, columns]
  bool together;     // all warps of a block take one bag: where bags are too few for the GPU
};

// out[t, j] = x[t] . matrix[indices[t, j]]
struct CudaDots {
  DType dtype;
  int64_t columns;
  CudaCodes codes;  // without values
  const void* x;    // [tokens, columns]
  int64_t x_stride;
  const void* matrix;
  int64_t matrix_rows, stride;
  void* out;  // [pairs]
};

// The k largest of each row of `dense`, as Selection of topk.h says.
struct CudaSelection {
  DType dtype;
  int64_t rows, width, k;  // k up to kMostSelected
  const void* dense;       // [rows, width]
  bool relu;
  void* values;          // [rows, k]
  int64_t* indices;      // [rows, k]
  int64_t shared_bytes;  // that a block takes at least
};
constexpr int64_t kMostSelected = 1024;

// A row is read twice: so much shared memory that the rows which are read at once stay in the L2.
inline int64_t choose_selection_shared_bytes(int64_t row_bytes, const CudaDevice& device) {
  constexpr int64_t kMostBlocks = 3;  // for whose threads a multiprocessor has registers
  const int64_t every = device.multiprocessors * row_bytes;
  const int64_t blocks = device.l2_bytes / 2 / (every > 0 ? every : 1);
  if (blocks >= kMostBlocks) return 0;
  constexpr int64_t kReserved = 1024;  // that a block costs beside what it asks for
  return device.shared_bytes / ((blocks > 1 ? blocks : 1) + 1) + kReserved;
}

// All asynchronous on the stream.
struct CudaKernels {
  void (*sum_bags)(const CudaBags& args, CudaStream stream);
  void (*dot_rows)(const CudaDots& args, CudaStream stream);
  void (*select)(const CudaSelection& args, CudaStream stream);
};

}  // namespace gossamer::actsparse::topk
