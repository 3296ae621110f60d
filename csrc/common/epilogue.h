#pragma once
#include <cstdint>

#include "common/activation.h"

namespace gossamer {

// What becomes of the sums of a task: act(sum + bias), rounded to the storage type, row by row.
struct Epilogue {
  const void* bias;  // of the task's first output on, or null
  Activation activation;
  void* out;  // the task's first row and output
  int64_t out_stride;
  int64_t n;  // outputs from the first one to the end of the row
};

}  // namespace gossamer
