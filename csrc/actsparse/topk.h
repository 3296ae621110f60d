#pragma once
// Sums of rows of a matrix, and products with rows of it, that k-sparse codes are made of. With a
// code of k (value v, index i) pairs a token and a dictionary W [width, d]:
//
//   decode    y[t] = sum_j v[t, j] W[i[t, j]] + b           sum_bags, a bag a token
//   values    g[t, j] = dy[t] . W[i[t, j]]                  dot_rows
//   weight    G[r] = sum over (t, j) with i[t, j] = r of v[t, j] dy[t]
//                                                           sum_bags of dy, a bag a row of W
//
//     v |.5  2 |  i |3 0|        W  row 0 ----+ 2
//       | 1 -1 |    |1 3|           row 1 ----|---+ 1     y[0] = .5 W[3] + 2 W[0]
//                                   row 2     |   |       y[1] =  1 W[1] - 1 W[3]
//                                   row 3 ----+ .5+ -1
//
// The order of every sum depends on shapes alone, so results are the same for any number of
// threads.
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::actsparse::topk {

// out[bag] = sum of its pairs' scale * matrix[row] (+ bias).
struct Bags {
  DType dtype;  // float32, bfloat16, float16, float64
  int64_t bags, columns;
  int64_t k;              // pairs a bag, where `begins` is null
  const int64_t* begins;  // [bags + 1]: the pairs of a bag lie from its entry to the next
  const uint32_t* rows;   // [pairs], checked
  const void* scales;     // [pairs] float; double for float64
  const void* matrix;     // [matrix_rows, columns]
  int64_t matrix_rows, stride;
  const void* bias;  // [columns] or null
  void* out;         // [bags, columns]
  int threads;
};

void sum_bags(const Bags& args);
void sum_bags_serial(const Bags& args);  // the readable definition

// out[t, j] = x[t] . matrix[rows[t, j]]
struct Dots {
  DType dtype;
  int64_t tokens, k, columns;
  const uint32_t* rows;  // [tokens, k], checked
  const void* x;         // [tokens, columns]
  int64_t x_stride;
  const void* matrix;  // rows of `columns`
  int64_t stride;
  void* out;  // [tokens, k]
  int threads;
};

void dot_rows(const Dots& args);
void dot_rows_serial(const Dots& args);

// Values of a 16-bit type in float, which the pairs' scales are in.
void widen(DType dtype, const void* from, int64_t count, float* to, int threads);

// The pairs of [tokens, k] codes, sorted by row and within a row as they were: the bags of the
// gradient to W.
template <class Real>
struct ByRow {
  std::vector<int64_t> begins;   // [matrix rows + 1]
  std::vector<uint32_t> tokens;  // [pairs]
  std::vector<Real> scales;      // [pairs]
};
template <class Real>
ByRow<Real> sort_by_row(const uint32_t* rows, const Real* scales, int64_t tokens, int64_t k,
                        int64_t matrix_rows, int threads);

// Codes as a matrix [tokens, width] that is dense.
struct DenseCodes {
  DType dtype;
  int64_t tokens, k, width;
  const uint32_t* rows;  // [tokens, k], checked
  const void* from;
  void* to;
  int threads;
};

// to[t, rows[t, j]] = from[t, j], zeros elsewhere. False where a token names a row a second time,
// with other values than 0: their sum may be no number of the dtype.
bool scatter(const DenseCodes& args);
// to[t, j] = from[t, rows[t, j]]
void gather(const DenseCodes& args);

// The k largest of each row of `dense`, largest first; of equal ones the lower index first, a NaN
// being larger than any number. With `relu` negative ones become 0 after that.
struct Selection {
  DType dtype;
  int64_t rows, width, k;
  const void* dense;  // [rows, width]
  bool relu;
  void* values;      // [rows, k]
  int64_t* indices;  // [rows, k]
  int threads;
};

void select(const Selection& args);
void select_serial(const Selection& args);

void bind(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace gossamer::actsparse::topk
