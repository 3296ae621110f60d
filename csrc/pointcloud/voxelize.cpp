#include "pointcloud/voxelize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pointcloud/radix_sort.h"

namespace gossamer::pointcloud {
namespace {

template <class Real>
void quantize_typed(const Points& points, int32_t* coords, int threads) {
  const auto* positions = static_cast<const Real*>(points.positions);
  const int parts = parts_of(threads, points.count);
  std::vector<int64_t> refused(parts, points.count);
  for_parts(parts, points.count, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t* to = coords + i * (points.axes + 1);
      to[0] = points.batch ? points.batch[i] : 0;
      for (int a = 0; a < points.axes; ++a) {
        const double cell =
            std::floor(static_cast<double>(positions[i * points.axes + a]) / points.size[a]);
        if (!(cell >= INT32_MIN && cell <= INT32_MAX)) {  // nor where it is NaN
          refused[part] = std::min(refused[part], i);
          break;
        }
        to[a + 1] = static_cast<int32_t>(cell);
      }
    }
  });
  const int64_t row = *std::min_element(refused.begin(), refused.end());
  if (row == points.count) return;
  std::ostringstream text;
  for (int a = 0; a < points.axes; ++a) {
    text << (a ? ", " : "") << positions[row * points.axes + a];
  }
  fail("voxelize: point ", row, ", [", text.str(),
       "], is not finite or lies in no voxel that int32 numbers");
}

template <class T>
void reduce_typed(const ReduceArgs& args) {
  const auto* feats = static_cast<const T*>(args.feats);
  auto* out = static_cast<T*>(args.out);
  const int64_t channels = args.channels;
  for_parts(
      parts_of(args.threads, args.points), args.voxels, [&](int64_t, int64_t first, int64_t last) {
        std::vector<double> total(channels);
        for (int64_t v = first; v < last; ++v) {
          const int64_t begin = args.begins[v], end = args.begins[v + 1];
          const auto row = [&](int64_t rank) {
            return feats + (args.order ? args.order[rank] : rank) * channels;
          };
          T* to = out + v * channels;
          if (args.reduce == Reduce::kFirst || end - begin == 1) {
            std::copy_n(row(begin), channels, to);
            continue;
          }
          for (int64_t c = 0; c < channels; ++c) total[c] = to_float(row(begin)[c]);
          for (int64_t rank = begin + 1; rank < end; ++rank) {
            const T* x = row(rank);
            for (int64_t c = 0; c < channels; ++c) {
              const double value = to_float(x[c]);
              if (args.reduce == Reduce::kMean) {
                total[c] += value;
              } else if (value > total[c] || std::isnan(value)) {
                total[c] = value;
              }
            }
          }
          const double share = args.reduce == Reduce::kMean ? static_cast<double>(end - begin) : 1;
          for (int64_t c = 0; c < channels; ++c) {
            round_to(static_cast<decltype(to_float(T{}))>(total[c] / share), to[c]);
          }
        }
      });
}

}  // namespace

void quantize(const Points& points, int32_t* coords, int threads) {
  if (points.dtype == DType::kFloat64) return quantize_typed<double>(points, coords, threads);
  quantize_typed<float>(points, coords, threads);
}

Voxels::Voxels(const Rows& rows, int threads)
    : rows_(rows), parts_(parts_of(threads, rows.count)), first_(parts_ + 1, 0) {
  for_parts(parts_, rows_.count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t rank = begin; rank < end; ++rank) n += begins_at(rank);
    first_[part + 1] = n;
  });
  for (int part = 0; part < parts_; ++part) first_[part + 1] += first_[part];
}

bool Voxels::begins_at(int64_t rank) const {
  return rank == 0 || std::memcmp(rows_.at_rank(rank), rows_.at_rank(rank - 1),
                                  rows_.columns * sizeof(int32_t)) != 0;
}

void Voxels::write(int32_t* coords, int64_t* voxel_of, int64_t* begins) const {
  for_parts(parts_, rows_.count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t voxel = first_[part] - 1;
    for (int64_t rank = begin; rank < end; ++rank) {
      if (begins_at(rank)) {
        ++voxel;
        begins[voxel] = rank;
        std::copy_n(rows_.at_rank(rank), rows_.columns, coords + voxel * rows_.columns);
      }
      voxel_of[rows_.order ? rows_.order[rank] : rank] = voxel;
    }
  });
  begins[count()] = rows_.count;
}

void reduce(const ReduceArgs& args) {
  switch (args.dtype) {
    case DType::kFloat64: return reduce_typed<double>(args);
    case DType::kFloat32: return reduce_typed<float>(args);
    case DType::kBFloat16: return reduce_typed<BFloat16>(args);
    case DType::kFloat16: return reduce_typed<Float16>(args);
    default: return;  // refused at the border
  }
}

}  // namespace gossamer::pointcloud
