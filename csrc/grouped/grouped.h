#pragma once
// Linear layers of many experts over tokens sorted by expert:
//
//   y[t, n] = act(sum_k x[t, k] W[e, n, k] + b[e, n]),   e the expert of token t
//
// Expert e has the tokens from ends[e - 1] (0 for the first one) up to ends[e]:
//
//   ends = 2 2 5      x     W            y = x W^T, block by block
//                    |0|   |0|
//                    |0|                 |0    |
//                    |2|   |1| no token  |    0|
//                    |2|                 |  2  |
//                    |2|   |2|
//
// The sum of a token and an output runs over k in one order, whatever the other tokens, the split
// into tasks and the number of threads: equal tokens of an expert have equal y, bit by bit.
#include <cstdint>

#include "common/activation.h"
#include "common/choice.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::grouped {

struct GroupedArgs {
  DType dtype;  // float32, bfloat16, float16, float64
  int64_t experts, n, k;
  const void* x;  // [tokens, k], its rows x_stride elements apart
  int64_t x_stride;
  const void* weights;  // [experts, n, k]
  const void* bias;     // [experts, n] or null
  const int64_t* ends;  // [experts], checked
  Activation activation;
  void* out;  // [tokens, n]
  int threads;

  int64_t begin(int64_t expert) const { return expert == 0 ? 0 : ends[expert - 1]; }
};

void gemm(const GroupedArgs& args);
void gemm_serial(const GroupedArgs& args);  // the readable definition

// The kernel that the target in force has for a dtype: "serial", "dot" or "tiles", and whose it is.
Choice choose(DType dtype);

void bind(pybind11::module_& m);
void bind_gemm_cuda(pybind11::module_& m);

}  // namespace gossamer::grouped
