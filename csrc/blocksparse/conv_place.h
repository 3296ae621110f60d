#pragma once
// Which pixel of x a place of a panel stands for. Included by units of one instruction set.
#include "blocksparse/conv_unit.h"

namespace gossamer::blocksparse {
namespace {

// Where x has the pixel that row `row` and column `column` of a plane stand for: an index within
// the strip's images, or -1.
struct Place {
  const ConvShape& s;
  const Strip& strip;
  const Panel& panel;
  int64_t depth, h, w;  // of the first one
  Place(const ConvShape& shape, const Strip& of, const Panel& in, const int64_t (&offset)[3])
      : s(shape),
        strip(of),
        panel(in),
        depth(of.depth * shape.stride[0] + offset[0] - shape.padding[0]),
        h(of.row * shape.stride[1] + offset[1] - shape.padding[1]),
        w(of.column * shape.stride[2] + offset[2] - shape.padding[2]) {}
  int64_t row_of(int64_t row) const {  // of all rows of x
    const int64_t at = h + row % panel.image_rows * s.stride[1];
    if (depth < 0 || depth >= s.in[0] || at < 0 || at >= s.in[1]) return -1;
    return (row / panel.image_rows * s.in[0] + depth) * s.in[1] + at;
  }
  int64_t column_of(int64_t column) const {
    const int64_t at = w + column * s.stride[2];
    return at < 0 || at >= s.in[2] ? -1 : at;
  }
};

}  // namespace
}  // namespace gossamer::blocksparse
