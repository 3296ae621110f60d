// The readable definition, for every dtype and any machine.
#include "common/conv_serial.h"

#include <algorithm>

#include "blocksparse/blocksparse.h"
#include "common/activate_serial.h"

namespace gossamer::blocksparse {
namespace {

// Where a weight lies among the values.
int64_t value_at(const Weight& w, int64_t block, int64_t row, int64_t col) {
  if (!w.packed) return (block * w.rows + row) * w.cols + col;
  const int64_t per_word = w.dtype == DType::kFloat32 ? 1 : 2;
  const int64_t word = block * ceil_div(w.cols, per_word) + col / per_word;
  return (word * w.rows + row) * per_word + col % per_word;
}

// The outputs of one block row for one pixel: sum[r] += W[row r, live blocks] x.
template <class T, class Real>
void add_block_row(const Weight& w, int64_t block_row, const T* const* taps_of_x,
                   int64_t channel_stride, Real* sum) {
  const auto* values = static_cast<const T*>(w.values);
  const int64_t first_channel = block_row / w.row_blocks() * w.group_in;
  for (int64_t block = w.crow_indices[block_row]; block < w.crow_indices[block_row + 1]; ++block) {
    const int64_t tap = w.col_indices[block] / w.col_blocks();
    const int64_t channel = w.col_indices[block] % w.col_blocks() * w.cols;
    if (taps_of_x[tap] == nullptr) continue;
    const T* x = taps_of_x[tap] + (first_channel + channel) * channel_stride;
    const int64_t cols = std::min(w.cols, w.group_in - channel);
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        sum[r] += to_float(values[value_at(w, block, r, c)]) * to_float(x[c * channel_stride]);
      }
    }
  }
}

template <class T>
void conv_pixels(const ConvArgs& args, int64_t begin, int64_t end) {
  using Real = decltype(to_float(T{}));  // double for double, float for the rest
  const Weight& w = args.weight;
  const ConvShape& s = args.shape;
  const auto *bias = static_cast<const T*>(args.bias),
             *residual = static_cast<const T*>(args.residual);
  const auto* all = static_cast<const T*>(args.out);
  const auto one_pixel = [&](const T* const* taps_of_x, T* out) {
    for (int64_t block_row = 0; block_row < w.block_rows(); ++block_row) {
      Real sum[kMaxBlock] = {};
      add_block_row(w, block_row, taps_of_x, s.in_channel_stride(), sum);
      const int64_t in_group = block_row % w.row_blocks() * w.rows;
      const int64_t first = block_row / w.row_blocks() * w.group_out + in_group;
      for (int64_t r = 0; r < std::min(w.rows, w.group_out - in_group); ++r) {
        if (bias != nullptr) sum[r] += to_float(bias[first + r]);
        T& y = out[(first + r) * s.out_channel_stride()];
        if (args.residual != nullptr) sum[r] += to_float(residual[&y - all]);
        round_to(activate(sum[r], args.activation), y);
      }
    }
  };
  for_each_pixel<T>(s, args.x, args.out, begin, end, one_pixel);
}

}  // namespace

void conv_serial(const ConvArgs& args) {
  for_pixel_ranges(
      args.weight.dtype, args.shape, args.threads,
      [&]<class T>(T, int64_t begin, int64_t end) { conv_pixels<T>(args, begin, end); });
}

}  // namespace gossamer::blocksparse
