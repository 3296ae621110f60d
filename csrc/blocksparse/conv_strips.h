#pragma once
// How the strips of a convolution are gone through, and where what of x and y lies in one.
#include <vector>

#include "blocksparse/conv_config.h"
#include "blocksparse/conv_unit.h"
#include "common/parallel.h"

namespace gossamer::blocksparse {

// Of the strips of all images, that at `at`.
template <class Config>
Strip strip_at(const ConvShape& s, const Config& config, int64_t at) {
  const int64_t columns = ceil_div(s.out[2], config.strip_width);
  const int64_t rows = ceil_div(s.out[1], config.strip_rows);
  const int64_t column = at % columns * config.strip_width;
  const int64_t row = at / columns % rows * config.strip_rows;
  const int64_t slice = at / columns / rows;
  const int64_t image = slice / s.out[0] * config.strip_images;
  return {image,
          std::min(config.strip_images, s.batch - image),
          slice % s.out[0],
          row,
          std::min(config.strip_rows, s.out[1] - row),
          column,
          std::min(config.strip_width, s.out[2] - column)};
}

// Calls body(strip, part) for each part of the outputs of each strip, on a team of threads.
template <class Config, class Body>
void for_each_strip(const ConvShape& s, const Config& config, const Body& body) {
  const int64_t tasks = strips_of(s, config) * config.parts;
  parallel_run(static_cast<int>(std::min<int64_t>(config.threads, tasks)),
               [&](int thread, int team) {
                 for (int64_t task = thread; task < tasks; task += team) {
                   body(strip_at(s, config, task / config.parts), task % config.parts);
                 }
               });
}

// Of y, the element that the strip's first output of channel 0 is.
inline int64_t first_of(const ConvShape& s, const Strip& strip) {
  const int64_t pixel = (strip.depth * s.out[1] + strip.row) * s.out[2] + strip.column;
  return strip.image * s.out_pixels() * s.out_channels + pixel * s.out_pixel_stride();
}

// Where each tap begins in the panel.
inline std::vector<int64_t> taps_in(const ConvShape& s, const Panel& panel) {
  std::vector<int64_t> taps;
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    const int64_t kd = tap / (s.kernel[1] * s.kernel[2]);
    const int64_t kh = tap / s.kernel[2] % s.kernel[1], kw = tap % s.kernel[2];
    const int64_t plane_w = panel.own_columns ? kw : phase(s, 2, kw);
    const int64_t plane_h = panel.own_rows ? kh : phase(s, 1, kh);
    const int64_t plane = (kd * planes_h(s, panel) + plane_h) * planes_w(s, panel) + plane_w;
    const int64_t shifted = (panel.own_rows ? 0 : shift(s, 1, kh)) * panel.pitch +
                            (panel.own_columns ? 0 : shift(s, 2, kw));
    taps.push_back(plane * panel.plane_stride + shifted * panel.slab);
  }
  return taps;
}

// `pack` as Kernel has it.
template <class Pack>
void pack_panel(const ConvShape& s, const void* x, Pack pack, const Strip& strip,
                const Panel& panel) {
  float* plane = panel.data;
  for (int64_t kd = 0; kd < s.kernel[0]; ++kd) {
    for (int64_t h = 0; h < planes_h(s, panel); ++h) {
      for (int64_t w = 0; w < planes_w(s, panel); ++w, plane += panel.plane_stride) {
        const int64_t offset[3] = {kd * s.dilation[0], panel.own_rows ? h * s.dilation[1] : h,
                                   panel.own_columns ? w * s.dilation[2] : w};
        pack(s, x, strip, panel, offset, plane);
      }
    }
  }
}

}  // namespace gossamer::blocksparse
