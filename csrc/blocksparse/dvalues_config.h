#pragma once
// How the gradient of a weight is cut up: a pure function of shape and weight, lanes and threads.
#include "blocksparse/conv_config.h"
#include "blocksparse/dvalues_unit.h"

namespace gossamer::blocksparse {

struct DvaluesConfig {
  int64_t strip_images, strip_rows, strip_width;  // as ConvConfig has them
  // Whatever the threads: the strips go into so many sums, which are added up in their order.
  int64_t sums;
  int64_t shares;  // of the block rows; each packs its own panels
  int threads;
};

inline Slabs slabs_of(const Weight& w, int64_t first_group, int64_t groups, int64_t lanes) {
  return {groups, first_group, w.group_in, lanes % w.cols == 0 ? lanes : w.cols, lanes};
}

// Floats of a block's sums: [columns][rows][lane].
inline int64_t sums_of_block(const Weight& w, int64_t lanes) {
  return ceil_div(w.cols, lanes) * Rows{w.rows, lanes}.padded() * lanes;
}

inline DvaluesConfig choose_dvalues_config(const ConvShape& s, const Weight& w, int64_t lanes,
                                           int64_t l2, int threads) {
  constexpr int64_t kMostSums = 8, kMostBytes = 8 << 20;
  ConvShape padded = s;  // its channels as they lie in the panel
  padded.in_channels = w.groups * slabs_of(w, 0, w.groups, lanes).of_group() * lanes;
  const int64_t outputs = w.block_rows() * Rows{w.rows, lanes}.padded();
  // dy takes its part of the cache. Strips as for one thread: which pixels are summed up together
  // does not depend on how many there are.
  const int64_t of_x = l2 / 2 * padded.in_channels / (padded.in_channels + outputs);
  const int64_t kept = w.nnz * w.rows * w.cols;
  const ConvConfig strips = choose_strips(padded, kept, 1, lanes, lanes, of_x, 1);
  const double work = static_cast<double>(s.batch) * s.out_pixels() * kept;
  DvaluesConfig config{strips.strip_images,
                       strips.strip_rows,
                       strips.strip_width,
                       1,
                       1,
                       threads_for_work(threads, work)};
  const int64_t count = strips_of(s, config);
  const auto idle = [](int64_t tasks, int64_t team) {
    return static_cast<double>(ceil_div(tasks, team) * team - tasks) / tasks;
  };
  const int64_t bytes = std::max<int64_t>(4 * w.nnz * sums_of_block(w, lanes), 1);
  int64_t most = std::clamp<int64_t>(kMostBytes / bytes, 1, std::min(kMostSums, count));
  while (idle(count, most) > 0.1) --most;  // one sum leaves none idle
  config.sums = most;
  const int64_t most_shares = std::min<int64_t>(w.block_rows(), 4 * config.threads);
  while (config.shares < most_shares && idle(config.sums * config.shares, config.threads) > 0.1) {
    ++config.shares;
  }
  return config;
}

}  // namespace gossamer::blocksparse
