#pragma once
// Products that skip zero activations. Two of them, by which side of the weight the zeros strike:
//
//   linear    y[m, n] = act(sum over active k of x[m, k] W[k, n] + b[n]),  W [K, N], input-major
//   outputs   y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]) where (m, n) is wanted, else 0,  W [N, K]
//
//   x      . 3 . 1         W    - - - -   skipped        A skipped row of W is not read at all
//                               2 0 1 5   times 3        where no token wants it, so that the
//                               - - - -   skipped        bytes fall with the zeros.
//                               4 1 1 0   times 1
//
// x[m, k] is active unless |x[m, k]| <= threshold: NaN and infinities are active. The sum of a
// token and an output runs over k in one order, whatever the other tokens, the split into tasks
// and the number of threads: equal tokens have equal y, bit by bit.
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::actsparse {

struct LinearArgs {
  DType dtype;  // float32, bfloat16, float16, float64
  int64_t m, n, k;
  const void* x;  // [m, k], its rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // [k, n], its rows weight_stride elements apart
  int64_t weight_stride;
  const void* bias;  // [n] or null
  double threshold;  // 0 or more, a value of the dtype
  Activation activation;
  void* out;  // [m, n]
  int threads;
};

struct OutputsArgs {
  DType dtype;
  int64_t m, n, k;
  const void* x;  // [m, k], its rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // [n, k], its rows weight_stride elements apart
  int64_t weight_stride;
  const void* bias;       // [n] or null
  const uint8_t* wanted;  // [m, n], 0 or 1
  Activation activation;
  void* out;  // [m, n]
  int threads;
};

// False, with nothing written, where so much of x is active that a dense product of the masked x
// takes less time.
bool linear(const LinearArgs& args);
void linear_serial(const LinearArgs& args);    // the readable definition
bool outputs(const OutputsArgs& args);         // the same, of what is wanted
void outputs_serial(const OutputsArgs& args);  // the readable definition

// Whose kernels the target in force has for a dtype.
const char* kernel_target(DType dtype);

void bind(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // what a GPU computes

}  // namespace gossamer::actsparse
