#pragma once
#include <cstdint>

#include "common/activation.h"

namespace gossamer {

// What becomes of the sums of a task: act(sum + bias + residual), rounded to the storage type, row
// by row.
struct Epilogue {
  const void* bias;  // of the task's first output on, or null
  Activation activation;
  void* out;  // the task's first row and output
  int64_t out_stride;
  int64_t n;  // outputs from the first one to the end of the row
  // Of convolutions: how many bytes behind y the residual lies, which has its layout; 0 is none.
  intptr_t residual = 0;
};

// `static`: see common/dtype.h.
static inline intptr_t residual_offset(const void* residual, const void* out) {
  if (residual == nullptr) return 0;
  return reinterpret_cast<intptr_t>(residual) - reinterpret_cast<intptr_t>(out);
}

}  // namespace gossamer
