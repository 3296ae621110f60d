#pragma once
// Linear layers and convolutions whose weights are zero in whole blocks:
//
//   y[o, n] = act(sum_{tap, c} x[at(o, tap), c] * W[n, tap, c] + b[n] + residual[o, n])
//
// with the sum over the live blocks of W alone; at() as in common/conv_shape.h.
//
// Format (block compressed rows). The weight is seen channels-last, as the matrix
// [C_out, taps * C_in / groups] in which tap (kd, kh, kw order) varies slower than channel. Blocks
// of `rows` x `cols`, each 1 to 64, are laid per group and per tap, so none crosses from one group
// or tap into the next; where they stick out over its edge they are padded:
//
//   row_blocks = ceil(C_out / groups / rows) block rows a group, groups * row_blocks altogether;
//   col_blocks = ceil(C_in / groups / cols) block columns a tap, taps * col_blocks altogether.
//
//   crow_indices int32 [groups * row_blocks + 1]  where each block row begins among the blocks:
//                                                 0 first, never decreasing, nnz last
//   col_indices  int32 [nnz]                      block column of each block, strictly increasing
//                                                 within a block row: tap = it / col_blocks
//   values       [nnz, rows, cols]                of the weight's dtype; padding holds 0
//
//      one group, 3 channels in, 2 taps, blocks of 2 x 2:     tap 0       tap 1
//      W = 5 rows x 6 columns; p is padding, and the          a b|c p     . . | . p
//      block columns are 0 1 | 2 3.                           d e|f p     . . | . p
//      crow_indices = 0 2 2 4                                 ---+---     ----+----
//      col_indices = 0 1, 2 3                                 . .|. p     . . | . p
//      values = [ab/de] [cp/fp] [gh/pp] [ip/pp]               . .|. p     . . | . p
//                                                             ---+---     ----+----
//                                                             . .|. p     g h | i p
//                                                             p p|p p     p p | p p
//
// Packed, for inference, the 32-bit words of each block are transposed, a last half word padded:
//
//   values [nnz, ceil(cols / w), rows, w]         w of the dtype in a word: 1 or 2
//
// In a padded column there is no x: kernels take it as 0 and never read past the channels of a
// group. In a padded row there is no output. Whether a weight that is not finite meets the zeros
// around x, or its tap is left out there, is up to a kernel; that a number of x which is not finite
// reaches no output but through a live block is not. A CPU's kernels trust the indices: whoever
// calls them has checked them (check_indices), at every call; a GPU's (cuda.h) do not.
#include <cstdint>

#include "common/activation.h"
#include "common/ceil_div.h"
#include "common/conv_shape.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::blocksparse {

constexpr int kMaxBlock = 64;  // rows and columns of a block

struct Weight {
  DType dtype;                                // float32, bfloat16, float16, float64
  int64_t groups, group_out, taps, group_in;  // channels are those of one group
  int64_t rows, cols;                         // of a block
  int64_t nnz;                                // live blocks
  const int32_t* crow_indices;
  const int32_t* col_indices;
  const void* values;
  bool packed = false;

  int64_t row_blocks() const { return ceil_div(group_out, rows); }  // of a group
  int64_t col_blocks() const { return ceil_div(group_in, cols); }   // of a tap
  int64_t block_rows() const { return groups * row_blocks(); }
  int64_t block_columns() const { return taps * col_blocks(); }
};

struct ConvArgs {
  Weight weight;  // agrees with the shape in groups, taps and channels
  ConvShape shape;
  const void* x;     // in the weight's dtype
  const void* bias;  // [out_channels] or null
  Activation activation;
  void* out;
  int threads;
  const void* residual = nullptr;  // as out, or none
};

void conv(const ConvArgs& args);         // chooses target and kernel
void conv_serial(const ConvArgs& args);  // the definition; float64 has no other

// The gradient of the live blocks' values, [nnz, rows, cols] with 0 in the padding:
//
//   dvalues[block][r, c] = sum_o dy[o, n + r] * x[at(o, tap), channel + c]
//
// over the pixels o of all images, n, tap and channel being where the block lies. Whether a number
// of dy that is not finite meets the zeros around x is up to a kernel. The same for any number of
// threads.
struct DvaluesArgs {
  Weight weight;  // its values are not read
  ConvShape shape;
  const void* x;  // in the weight's dtype, as dy
  const void* dy;
  void* dvalues;
  int threads;
};

void dvalues(const DvaluesArgs& args);         // chooses the target
void dvalues_serial(const DvaluesArgs& args);  // the definition; float64 has no other

// ValueError with the first thing that is wrong with the indices, in O(nnz).
void check_indices(const Weight& weight);
// The same of the padding, which has to hold 0. Expects checked indices.
void check_padding(const Weight& weight);

// Between the portable form and the dense [C_out, taps, C_in / groups], contiguous.
// live[block row, block column] = 1 where the block holds a number that is not 0 (-0.0 is 0).
void find_live(const void* dense, const Weight& shape, uint8_t* live, int threads);
// The entries of the live blocks, 0 in the padding: the adjoint of to_dense.
void gather(const void* dense, const Weight& pattern, void* values, int threads);
void to_dense(const Weight& weight, void* dense, int threads);

void bind(pybind11::module_& m);

}  // namespace gossamer::blocksparse
