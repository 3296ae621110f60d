// The readable definition, for every dtype and any machine. Sums are float64.
#include <algorithm>

#include "blocksparse/blocksparse.h"
#include "common/conv_serial.h"

namespace gossamer::blocksparse {
namespace {

// sums[r][c] of one block: over all pixels of y whose tap lies in x.
template <class T>
void add_block(const DvaluesArgs& args, int64_t block_row, int64_t column, double* sums) {
  const Weight& w = args.weight;
  const ConvShape& s = args.shape;
  const int64_t group = block_row / w.row_blocks(), row = block_row % w.row_blocks() * w.rows;
  const int64_t tap = column / w.col_blocks(), channel = column % w.col_blocks() * w.cols;
  const int64_t rows = std::min(w.rows, w.group_out - row);
  const int64_t cols = std::min(w.cols, w.group_in - channel);
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel) {
      const int64_t at[3] = {pixel / (s.out[1] * s.out[2]), pixel / s.out[2] % s.out[1],
                             pixel % s.out[2]};
      const T* x = x_at(s, static_cast<const T*>(args.x), image, at, tap);
      if (x == nullptr) continue;
      x += (group * w.group_in + channel) * s.in_channel_stride();
      const T* dy = static_cast<const T*>(args.dy) + image * s.out_pixels() * s.out_channels +
                    pixel * s.out_pixel_stride() +
                    (group * w.group_out + row) * s.out_channel_stride();
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          sums[r * w.cols + c] += static_cast<double>(to_float(dy[r * s.out_channel_stride()])) *
                                  to_float(x[c * s.in_channel_stride()]);
        }
      }
    }
  }
}

template <class T>
void block_rows(const DvaluesArgs& args, int64_t begin, int64_t end) {
  using Real = decltype(to_float(T{}));
  const Weight& w = args.weight;
  for (int64_t block_row = begin; block_row < end; ++block_row) {
    for (int64_t b = w.crow_indices[block_row]; b < w.crow_indices[block_row + 1]; ++b) {
      double sums[kMaxBlock * kMaxBlock] = {};
      add_block<T>(args, block_row, w.col_indices[b], sums);
      T* to = static_cast<T*>(args.dvalues) + b * w.rows * w.cols;
      for (int64_t i = 0; i < w.rows * w.cols; ++i) round_to(static_cast<Real>(sums[i]), to[i]);
    }
  }
}

}  // namespace

void dvalues_serial(const DvaluesArgs& args) {
  const Weight& w = args.weight;
  parallel_ranges(args.threads, w.block_rows(), [&](int64_t begin, int64_t end) {
    visit_floats(w.dtype, [&]<class T>(T) { block_rows<T>(args, begin, end); });
  });
}

}  // namespace gossamer::blocksparse
