#pragma once
// The border between conv.cpp and weight_grad.cpp, which cut the work, and the units that run a
// part of it with one instruction set. Plain structs and function pointers.
#include <cstdint>

#include "pointcloud/pointcloud.h"

namespace gossamer::pointcloud {

// A thread's range of outputs, by rank.
struct ConvTask {
  const ConvArgs& args;
  const float* weights;  // packed
  const float* bias;     // as a row of sums, zeros where there is none
  int64_t begin, end;
  int64_t* next;  // [taps], of each tap the first pair of these outputs; moves along with them
  int64_t tile;   // outputs whose sums are held at once
  float* sums;    // [tile][a row of sums]
};

// A row of sums has its groups so many floats apart.
struct SumsRow {
  int64_t group, all;
};

struct ConvUnit {
  const char* kernel;
  const char* why;
  SumsRow (*sums_row)(const Channels& channels);
  int64_t (*tap_floats)(const Channels& channels);  // of packed weights
  void (*pack)(const ConvArgs& args, int64_t tap, float* packed);
  void (*run)(const ConvTask& task);
};

// Some taps over a range of outputs, whose outer products are summed.
struct WeightGradTask {
  const WeightGradArgs& args;
  int64_t first_tap, last_tap;
  int64_t begin, end;  // outputs, by rank
  int64_t* next;       // [taps], as in ConvTask
  int64_t tile;        // outputs whose rows stay in L2 while the taps go by
  float* sums;         // [last_tap - first_tap][group_in][a row of sums]
};

struct WeightGradUnit {
  SumsRow (*sums_row)(const Channels& channels);
  void (*run)(const WeightGradTask& task);
};

// Null where the unit has no kernels for the dtype.
const ConvUnit* conv_unit_avx2(DType dtype, const Channels& channels);
const ConvUnit* conv_unit_avx512(DType dtype, const Channels& channels);
const ConvUnit* conv_unit_avx512_bf16(DType dtype, const Channels& channels);
const ConvUnit* conv_unit_amx_bf16(DType dtype, const Channels& channels);
const WeightGradUnit* weight_grad_unit_avx2(DType dtype, const Channels& channels);
const WeightGradUnit* weight_grad_unit_avx512(DType dtype, const Channels& channels);
const WeightGradUnit* weight_grad_unit_amx_bf16(DType dtype, const Channels& channels);

}  // namespace gossamer::pointcloud
