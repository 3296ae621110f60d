#pragma once
// Products with a weight W [n, k] of which single places are stored, anywhere (compressed rows):
//
//   values       what is stored, row by row, in a row by increasing column
//   crow_indices int32 [n + 1]: where each row begins among the values; 0 first, their number last
//   col_indices  the column of each: int16 where k <= 2^15, since few rows of x read W's bytes for
//                their whole time, and int32 otherwise
//
//   linear   y[m, i] = act(sum_j values[j] x[m, col[j]] + b[i])   over row i's j
//   dvalues  dvalues[j] = sum_m dy[m, i] x[m, col[j]]             i the row of j
//
// The gradient of x is the first one with the transposed pattern. A sum is made in one order,
// whatever the split into tasks and the number of threads.
#include <cstdint>

#include "common/activation.h"
#include "common/choice.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::csr {

struct Pattern {
  int64_t n, k;
  const int32_t* crow;
  const void* col;
  bool wide;  // int32 columns, not int16

  int64_t nnz() const { return crow[n]; }
  // Of place j; within the weight, whatever was written to col since it was checked.
  template <class Index>
  int64_t column(int64_t j) const {
    const auto number = static_cast<uint32_t>(static_cast<const Index*>(col)[j]);
    return number < k ? number : k - 1;
  }
};

// Columns of this many and fewer are numbered by int16.
constexpr int64_t kMostNarrow = int64_t{1} << 15;

struct LinearArgs {
  DType dtype;  // float32, bfloat16, float16, float64
  Pattern pattern;
  const void* values;
  int64_t rows;
  const void* x;  // [rows, k], its rows x_stride elements apart
  int64_t x_stride;
  const void* bias;  // [n] or null
  Activation activation;
  void* out;  // [rows, n]
  int threads;
};
void linear(const LinearArgs& args);
void linear_serial(const LinearArgs& args);  // the readable definition

struct DvaluesArgs {
  DType dtype;
  Pattern pattern;
  int64_t rows;
  const void* dy;  // [rows, n]
  int64_t dy_stride;
  const void* x;  // [rows, k]
  int64_t x_stride;
  void* dvalues;  // [nnz]
  int threads;
};
void dvalues(const DvaluesArgs& args);
void dvalues_serial(const DvaluesArgs& args);

// ValueError, with the values, where the indices are none of such a weight; of the rows alone,
// which takes next to nothing, at each product.
void validate(const char* op, const Pattern& pattern, int64_t count);
void validate_rows(const char* op, const Pattern& pattern, int64_t count);
// A number that is another one for other indices, all but certainly.
uint64_t fingerprint(const Pattern& pattern);
// The pattern with rows and columns exchanged, and of each of its places the one that it had.
void transpose(const Pattern& pattern, int32_t* crow, void* col, bool wide, int32_t* source);

// to[i] = from[source[i]], of numbers of so many bytes: 2, 4 or 8.
void gather(const void* from, const int32_t* source, int64_t count, int64_t size, void* to,
            int threads);

// The kernel that the target in force has for so many rows of x: "serial", "gather" (lanes along
// a row of W) or "tokens" (along the rows of x), and whose it is.
Choice choose(int64_t rows, DType dtype);

void bind(pybind11::module_& m);

}  // namespace gossamer::csr
