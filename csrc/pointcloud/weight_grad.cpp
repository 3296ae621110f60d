// Cuts the gradient of the weights over the threads, and adds up what the kernels make of its
// parts.
#include <algorithm>
#include <vector>

#include "common/cache_size.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "pointcloud/conv_split.h"
#include "pointcloud/conv_unit.h"

namespace gossamer::pointcloud {
namespace {

const WeightGradUnit* unit_of(Target target, DType dtype, const Channels& channels) {
#ifdef GOSSAMER_X86
  if (target == Target::kAVX2) return weight_grad_unit_avx2(dtype, channels);
#ifdef GOSSAMER_AMX
  if (target == Target::kAMXBF16) return weight_grad_unit_amx_bf16(dtype, channels);
#endif
  if (target != Target::kSerial) return weight_grad_unit_avx512(dtype, channels);
#endif
  (void)target, (void)dtype, (void)channels;
  return nullptr;
}

// The outputs are cut into so many segments, whatever the threads: a tap's sum over each is one of
// the parts that threads share out, and these are added up in their order.
constexpr int64_t kSegments = 4;

constexpr int64_t kLeastTile = 32, kMostTile = 1024;

thread_local Scratch part_sums, next_pairs;

class WeightGradient {
 public:
  WeightGradient(const WeightGradArgs& args, const WeightGradUnit& unit)
      : args_(args),
        unit_(unit),
        row_(unit.sums_row(args.channels)),
        each_(args.channels.group_in() * row_.all) {
    const KernelMap& map = args.map;
    for (int64_t s = 0; s <= kSegments; ++s) {
      ranks_.push_back(first_rank(map, s, kSegments));
      for (int64_t t = 0; t < map.taps; ++t) pairs_.push_back(pair_at(map, t, ranks_.back()));
    }
    sums_ = static_cast<float*>(
        part_sums.at_least(kSegments * map.taps * each_ * int64_t{sizeof(float)}));
  }

  void run() const {
    const int64_t taps = args_.map.taps;
    const double work = static_cast<double>(args_.map.pairs()) * static_cast<double>(each_);
    const int threads = threads_for_work(args_.threads, work);
    // Parts follow each other by segment; each thread takes those whose middle lies in its share.
    parallel_run(threads, [&](int thread, int team) {
      int64_t before = 0;
      for (int64_t s = 0; s < kSegments; ++s) {
        int64_t first_tap = taps, last_tap = taps;
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t pairs = pairs_[(s + 1) * taps + t] - pairs_[s * taps + t];
          if (owner(before + pairs / 2, team) == thread) {
            first_tap = std::min(first_tap, t);
            last_tap = t + 1;
          }
          before += pairs;
        }
        if (first_tap < taps) run_part(s, first_tap, last_tap);
      }
    });
    parallel_ranges(threads, taps, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) finish(t);
    });
  }

 private:
  int64_t owner(int64_t pair, int64_t team) const {
    return std::min(pair * team / std::max<int64_t>(args_.map.pairs(), 1), team - 1);
  }

  float* sums_of(int64_t segment, int64_t tap) const {
    return sums_ + (segment * args_.map.taps + tap) * each_;
  }

  void run_part(int64_t segment, int64_t first_tap, int64_t last_tap) const {
    const int64_t taps = args_.map.taps;
    auto* next = static_cast<int64_t*>(next_pairs.at_least(taps * int64_t{sizeof(int64_t)}));
    std::copy_n(pairs_.begin() + segment * taps, taps, next);
    const int64_t row_bytes = (args_.channels.in + args_.channels.out) * size_of(args_.dtype);
    const int64_t tile = std::clamp(l2_bytes() / 4 / row_bytes, kLeastTile, kMostTile);
    unit_.run({args_, first_tap, last_tap, ranks_[segment], ranks_[segment + 1], next, tile,
               sums_of(segment, first_tap)});
  }

  // The sums of a tap's parts, one after the other, rounded.
  template <class T>
  void finish_as(int64_t tap) const {
    float* sums = sums_of(0, tap);
    for (int64_t s = 1; s < kSegments; ++s) {
      const float* more = sums_of(s, tap);
      for (int64_t i = 0; i < each_; ++i) sums[i] += more[i];
    }
    const int64_t c_in = args_.channels.group_in();
    const int64_t groups = row_.all / row_.group, outputs = args_.channels.out / groups;
    auto* dw = static_cast<T*>(args_.dw) + tap * c_in * args_.channels.out;
    for (int64_t c = 0; c < c_in; ++c) {
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = sums + c * row_.all + g * row_.group;
        for (int64_t o = 0; o < outputs; ++o) round_to(from[o], *dw++);
      }
    }
  }
  void finish(int64_t tap) const {
    switch (args_.dtype) {
      case DType::kBFloat16: return finish_as<BFloat16>(tap);
      case DType::kFloat16: return finish_as<Float16>(tap);
      default: return finish_as<float>(tap);
    }
  }

  const WeightGradArgs& args_;
  const WeightGradUnit& unit_;
  const SumsRow row_;
  const int64_t each_;                  // floats of a part
  std::vector<int64_t> ranks_, pairs_;  // of each segment the first output, and the first pairs
  float* sums_;
};

}  // namespace

void weight_grad(const WeightGradArgs& args) {
  const WeightGradUnit* unit = unit_of(target(), args.dtype, args.channels);
  if (unit == nullptr) return weight_grad_serial(args);
  WeightGradient(args, *unit).run();
}

}  // namespace gossamer::pointcloud
