// Cuts a convolution into ranges of outputs, and hands them to the kernels of the target in force.
#include <algorithm>

#include "common/cache_size.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "pointcloud/conv_split.h"
#include "pointcloud/conv_unit.h"

namespace gossamer::pointcloud {
namespace {

const ConvUnit* unit_of(Target target, DType dtype, const Channels& channels) {
#ifdef GOSSAMER_X86
  switch (target) {
    case Target::kAVX2: return conv_unit_avx2(dtype, channels);
    case Target::kAVX512: return conv_unit_avx512(dtype, channels);
    case Target::kAVX512BF16: return conv_unit_avx512_bf16(dtype, channels);
#ifdef GOSSAMER_AMX
    case Target::kAMXBF16: return conv_unit_amx_bf16(dtype, channels);
#endif
    default: break;
  }
#endif
  (void)target, (void)dtype, (void)channels;
  return nullptr;
}

thread_local Scratch packed_weights, padded_bias, tile_sums, next_pairs;

// The sums of a tile, an eighth of L2, share it with the rows that it gathers and a tap's weights.
constexpr int64_t kLeastTile = 32, kMostTile = 1024;

void run_range(const ConvArgs& args, const ConvUnit& unit, const float* weights, const float* bias,
               int64_t begin, int64_t end) {
  if (begin >= end) return;
  const KernelMap& map = args.map;
  const int64_t row_bytes = unit.sums_row(args.channels).all * int64_t{sizeof(float)};
  const int64_t tile =
      std::min(std::clamp(l2_bytes() / 8 / row_bytes, kLeastTile, kMostTile), end - begin);
  auto* next = static_cast<int64_t*>(next_pairs.at_least(map.taps * int64_t{sizeof(int64_t)}));
  for (int64_t t = 0; t < map.taps; ++t) next[t] = pair_at(map, t, begin);
  auto* sums = static_cast<float*>(tile_sums.at_least(tile * row_bytes));
  unit.run({args, weights, bias, begin, end, next, tile, sums});
}

template <class T>
void pad_bias(const ConvArgs& args, const SumsRow& row, float* padded) {
  const auto* bias = static_cast<const T*>(args.bias);
  const int64_t groups = row.all / row.group, outputs = args.channels.out / groups;
  std::fill(padded, padded + row.all, 0.0f);
  for (int64_t o = 0; bias != nullptr && o < args.channels.out; ++o) {
    padded[o / outputs * row.group + o % outputs] = to_float(bias[o]);
  }
}

const float* bias_row(const ConvArgs& args, const SumsRow& row) {
  auto* padded = static_cast<float*>(padded_bias.at_least(row.all * int64_t{sizeof(float)}));
  switch (args.dtype) {
    case DType::kBFloat16: pad_bias<BFloat16>(args, row, padded); break;
    case DType::kFloat16: pad_bias<Float16>(args, row, padded); break;
    default: pad_bias<float>(args, row, padded);
  }
  return padded;
}

}  // namespace

void conv(const ConvArgs& args) {
  const ConvUnit* unit = unit_of(target(), args.dtype, args.channels);
  if (unit == nullptr) return conv_serial(args);
  const KernelMap& map = args.map;
  const int64_t tap_floats = unit->tap_floats(args.channels);
  auto* weights =
      static_cast<float*>(packed_weights.at_least(map.taps * tap_floats * int64_t{sizeof(float)}));
  const float* bias = bias_row(args, unit->sums_row(args.channels));
  const auto products = static_cast<double>(map.pairs() + map.n_out);
  const int threads = threads_for_work(
      args.threads, products * static_cast<double>(args.channels.group_in() * args.channels.out));
  parallel_ranges(std::min(threads, args.threads), map.taps, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) unit->pack(args, t, weights + t * tap_floats);
  });
  parallel_run(threads, [&](int thread, int team) {
    run_range(args, *unit, weights, bias, first_rank(map, thread, team),
              first_rank(map, thread + 1, team));
  });
}

Choice choose_conv(DType dtype, const Channels& channels) {
  const Target wanted = target();
  const ConvUnit* unit = unit_of(wanted, dtype, channels);
  if (unit == nullptr) {
    return {"serial", name(Target::kSerial),
            wanted == Target::kSerial ? "no vector target is in force"
                                      : "float64 has the serial kernel only"};
  }
  // A target without kernels of its own hands out those of the one before.
  Target owner = wanted;
  for (auto below = static_cast<int>(wanted) - 1; below >= 0; --below) {
    if (unit_of(static_cast<Target>(below), dtype, channels) == unit) {
      owner = static_cast<Target>(below);
    }
  }
  return {unit->kernel, name(owner), unit->why};
}

}  // namespace gossamer::pointcloud
