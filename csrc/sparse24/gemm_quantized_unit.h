#pragma once
// The border between gemm_quantized.cpp, which cuts a product with 8-bit or 4-bit weights into
// tasks, and the units that run one task with one instruction set.
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "sparse24/gemm_unit.h"
#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

// What a float8 is off by until its sum is finished: it is widened as a float16 whose exponent is
// eight too small, and x makes up for it.
constexpr float kE4M3Scale = 256;

// The scales of 4-bit weights beside a block of 16 rows, of which the other types have none: a line
// of 16 for each `records` records, or with records = 0 for each group of four columns.
struct ScaleLines {
  const float* lines;
  int64_t records;
};

// How sums become y: act(sum * x_scales[m] * scales[n] + bias[n]), from the task's first row and
// output on. Null scales and biases count as one and zero.
struct QuantizedEnds {
  const float* x_scales;
  const float* scales;
  DType out_dtype;
  const void* bias;
  Activation activation;
  void* out;
  int64_t out_stride;
  int64_t n;  // outputs to the end of a row
};

struct QuantizedTask {
  const uint32_t* panels;  // of one block
  int64_t records;
  ScaleLines scales;
  const void* x;  // packed tiles of `tile` rows
  void* scratch;  // for a block of expanded weights
  int tile;
  int64_t rows;
  QuantizedEnds ends;
};

struct QuantizedUnit {
  int max_rows;              // of a tile
  int64_t record_bytes;      // of a packed row of x, whose
  int64_t records_together;  // records are a multiple of these
  int64_t scratch_bytes;     // for each of those records
  // A tile with kernels for at least so many rows.
  int (*tile_for)(int64_t rows);
  // `numbers` are the 256 numbers of float8, times kE4M3Scale.
  void (*pack)(const XRows& x, DType dtype, const float* numbers, int tile, void* packed);
  // False where the result is not to be trusted, and the target before this one has to do it all.
  bool (*run)(const QuantizedTask& task);
  // A block as float32 panels, scaled; null where sums are no floats.
  void (*expand)(const uint32_t* panels, int64_t records, const ScaleLines& scales, uint32_t* out);
  // `outputs` of `rows` rows, whose sums are readable up to a whole register.
  void (*finish)(const QuantizedEnds& ends, const float* sums, int64_t sums_stride, int64_t rows,
                 int64_t outputs);
};

// Null where the unit has no kernels for values of the type.
const QuantizedUnit* quantized_unit_avx2(DType dtype);
const QuantizedUnit* quantized_unit_avx512(DType dtype);
const QuantizedUnit* quantized_unit_avx512_vnni(DType dtype);
// Of 4-bit values with x in bfloat16 alone, and lines of scales for whole records.
const QuantizedUnit* quantized_unit_amx(DType dtype);

}  // namespace gossamer::sparse24
