#pragma once
// 2:4 semi-structured GEMM: y[m,n] = act(sum_k x[m,k] * W[n,k] + b[n]), where in every group of
// four consecutive k at most two weights of a row are non-zero.
//
// Portable format (logical W is [N, K], G = ceil(K/4) groups a row):
//   values  [N, 2G]          the kept pair of each group, in increasing index order
//   indices [N, ceil(G/2)]   one byte for two groups, group g in the four bits from 4*(g mod 2):
//                            idx0 | idx1 << 2 with idx0 < idx1
//   A missing slot holds 0 at the lowest free index; an index past K holds 0 and x is not read
//   there.
//
// Panels, the CPU kernels' private layout, are that format transposed in 32-bit words, so that one
// register holds the same position of 16 rows of W. A record covers 16 rows x 32 columns:
//
//   word row 0      the 8 nibbles of each row's 8 groups     | lane 0 | lane 1 | ... | lane 15 |
//   word rows 1..   float32: kept value p of each row, p = 2*group + slot (16 word rows)
//                   16-bit:  the pair of group g, slot 0 in the low half  (8 word rows)
//                   8-bit:   the pairs of two groups                      (4 word rows)
//                   4-bit:   the pairs of four groups                     (2 word rows)
//
// Records of one block of 16 rows follow each other along K, blocks follow along N; N and K are
// padded with zeros. float64 has no panels. Indices that validate() would refuse never lead outside
// memory; what they multiply is unspecified. Of the bytes of a dense weight of the same type 17/32
// (float32) and 9/16 (16-bit), of a float32 one 5/32 (8-bit) and 3/32 (4-bit), read front to back.
#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace pybind11 {
class module_;
}

namespace gossamer::sparse24 {

constexpr int kBlockN = 16;
constexpr int kRecordK = 32;
constexpr int kRecordGroups = kRecordK / 4;

struct Weight {
  DType dtype;  // also int8, float8_e4m3fn, and uint8 for pairs of 4-bit numbers (quantized.h)
  int64_t n, k;
  const void* values;      // portable form,
  const uint8_t* indices;  // or null and
  const uint32_t* panels;  // the panels

  int64_t groups() const { return (k + 3) / 4; }
  int64_t index_bytes() const { return (groups() + 1) / 2; }
  int64_t value_columns() const { return dtype == DType::kUInt8 ? groups() : 2 * groups(); }
  int64_t blocks() const { return (n + kBlockN - 1) / kBlockN; }
  int64_t records() const { return (k + kRecordK - 1) / kRecordK; }  // of one block
  int64_t value_words() const {                                      // of a row in a record
    const int64_t slots = dtype == DType::kUInt8 ? kRecordGroups : 2 * kRecordGroups;
    return slots * size_of(dtype) / 4;
  }
  int64_t record_words() const { return (1 + value_words()) * kBlockN; }
  int64_t block_words() const { return records() * record_words(); }
};

struct GemmArgs {
  Weight weight;
  int64_t m;
  const void* x;     // [m, k] in the weight's dtype, columns contiguous
  int64_t x_stride;  // between rows, in elements
  const void* bias;  // [n] or null
  Activation activation;
  void* out;  // [m, n], row-major
  int threads;
};

void gemm(const GemmArgs& args);         // chooses target and kernel
void gemm_serial(const GemmArgs& args);  // the definition

// Dense [N, K] -> portable; ValueError if a group keeps more than two.
void from_dense(const void* dense, const Weight& shape, void* values, uint8_t* indices,
                int threads);
// The entries of a dense [N, K] at the positions kept by `indices`: the adjoint of to_dense.
void gather(const void* dense, const Weight& pattern, void* values, int threads);
void to_dense(const Weight& weight, void* dense, int threads);
void validate(const Weight& weight, int threads);
// Dense [N, K] -> the two largest magnitudes of every four (a tie keeps the lower index, a NaN is
// the largest), or of those, if soft, scale * sign(w) * (|w| - t), t the second smallest of the
// four; dense and packed.
void project(const void* weight, const Weight& shape, bool soft, double scale, void* dense,
             void* values, uint8_t* indices, int threads);
// gradient += factor * (weight - kept), `count` entries: a decay of what was not kept.
void add_dropped(const void* weight, const void* kept, int64_t count, DType dtype, double factor,
                 void* gradient, int threads);
// The errors of the two, by the first offending row * groups + group.
[[noreturn]] void fail_not_24(const Weight& weight, int64_t count, int64_t first);
[[noreturn]] void fail_indices(const Weight& weight, int64_t first, int byte);
// Portable -> panels of the blocks [begin, end), written from `panels` on; and back.
void to_panels(const Weight& weight, int64_t begin, int64_t end, uint32_t* panels);
void from_panels(const Weight& panels, int64_t begin, int64_t end, void* values, uint8_t* indices);

void bind(pybind11::module_& m);

}  // namespace gossamer::sparse24
