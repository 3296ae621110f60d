// Cuts the gradient of the weights into segments of pairs, and adds up what the kernels make of them.
#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "pointcloud/conv_unit.h"

namespace gossamer::pointcloud {
namespace {

const WeightGradUnit* unit_of(Target target, DType dtype, const Channels& channels) {
#ifdef GOSSAMER_X86
  if (target == Target::kAVX2) return weight_grad_unit_avx2(dtype, channels);
  if (target != Target::kSerial) return weight_grad_unit_avx512(dtype, channels);
#endif
  (void)target, (void)dtype, (void)channels;
  return nullptr;
}

// Pairs of a tap that are summed together, whatever the threads: at most kSegments more of them
// than taps, whose sums are in memory at once.
constexpr int64_t kSegments = 64, kLeastSegment = 2048;

struct Segment {
  int64_t tap, begin, end;
};

std::vector<Segment> segments_of(const KernelMap& map) {
  const int64_t most = std::max(kLeastSegment, ceil_div(map.pairs(), kSegments));
  std::vector<Segment> segments;
  for (int64_t t = 0; t < map.taps; ++t) {
    const int64_t first = map.tap_offsets[t], pairs = map.tap_offsets[t + 1] - first;
    const int64_t parts = std::max<int64_t>(ceil_div(pairs, most), 1);
    for (int64_t p = 0; p < parts; ++p) {
      segments.push_back({t, first + pairs * p / parts, first + pairs * (p + 1) / parts});
    }
  }
  return segments;
}

thread_local Scratch segment_sums;

// The sums of a tap's segments, one after the other, rounded.
template <class T>
void add_segments(const WeightGradArgs& args, const SumsRow& row, int64_t tap, float* sums,
                  int64_t count) {
  const int64_t c_in = args.channels.group_in();
  const int64_t groups = row.all / row.group, outputs = args.channels.out / groups;
  for (int64_t s = 1; s < count; ++s) {
    const float* more = sums + s * c_in * row.all;
    for (int64_t i = 0; i < c_in * row.all; ++i) sums[i] += more[i];
  }
  auto* dw = static_cast<T*>(args.dw) + tap * c_in * args.channels.out;
  for (int64_t c = 0; c < c_in; ++c) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = sums + c * row.all + g * row.group;
      for (int64_t o = 0; o < outputs; ++o) round_to(from[o], *dw++);
    }
  }
}

void add_segments(const WeightGradArgs& args, const SumsRow& row, int64_t tap, float* sums,
                  int64_t count) {
  switch (args.dtype) {
    case DType::kBFloat16: return add_segments<BFloat16>(args, row, tap, sums, count);
    case DType::kFloat16: return add_segments<Float16>(args, row, tap, sums, count);
    default: return add_segments<float>(args, row, tap, sums, count);
  }
}

}  // namespace

void weight_grad(const WeightGradArgs& args) {
  const WeightGradUnit* unit = unit_of(target(), args.dtype, args.channels);
  if (unit == nullptr) return weight_grad_serial(args);
  const KernelMap& map = args.map;
  const std::vector<Segment> segments = segments_of(map);
  const auto count = static_cast<int64_t>(segments.size());
  const SumsRow row = unit->sums_row(args.channels);
  const int64_t each = args.channels.group_in() * row.all;
  auto* sums = static_cast<float*>(segment_sums.at_least(count * each * int64_t{sizeof(float)}));
  const int threads =
      threads_for_work(args.threads, static_cast<double>(map.pairs()) * static_cast<double>(each));
  // Each thread takes the segments whose middle lies in its share of the pairs.
  parallel_run(threads, [&](int thread, int team) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t middle = (segments[s].begin + segments[s].end) / 2;
      const auto owner = std::min<int64_t>(middle * team / std::max<int64_t>(map.pairs(), 1),
                                           team - 1);
      if (owner == thread) unit->run({args, segments[s].begin, segments[s].end, sums + s * each});
    }
  });
  parallel_ranges(threads, map.taps, [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < count;) {
      const int64_t tap = segments[s].tap, first = s;
      while (s < count && segments[s].tap == tap) ++s;
      if (tap >= begin && tap < end) add_segments(args, row, tap, sums + first * each, s - first);
    }
  });
}

}  // namespace gossamer::pointcloud
