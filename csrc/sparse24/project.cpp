// Dense [N, K] -> what 2:4 training multiplies in its place: a projection, dense and packed.
#include "sparse24/project.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/target.h"

namespace gossamer::sparse24 {
namespace {

// A group of `count` columns; those past the end count as zeros and are not written.
template <class T>
void project_group(const T* w, int64_t count, bool soft, double scale, T* out) {
  using A = decltype(to_float(T{}));
  A magnitude[4] = {};
  for (int64_t i = 0; i < count; ++i) {
    const A size = std::abs(to_float(w[i]));
    magnitude[i] = size == size ? size : std::numeric_limits<A>::infinity();
  }
  int before[4] = {};  // how many come before it: a tie is won by the lower index
  A second_smallest = 0;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j)
      before[i] += j < i ? magnitude[j] >= magnitude[i] : magnitude[j] > magnitude[i];
    if (before[i] == 2) second_smallest = magnitude[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const A weight = to_float(w[i]);
    out[i] = T{};
    if (before[i] >= 2) continue;
    out[i] = w[i];
    if (!soft) continue;
    // Rounded after each step, as torch's operations are.
    round_to(std::abs(weight) - second_smallest, out[i]);
    const A above = to_float(out[i]) < 0 ? A{} : to_float(out[i]);
    round_to(std::copysign(above * static_cast<A>(scale), weight), out[i]);
  }
}

ProjectRow wide_row(DType dtype, bool soft) {
  const ProjectUnit* unit = nullptr;
#ifdef GOSSAMER_X86
  if (target() >= Target::kAVX512) {
    unit = project_unit_avx512(dtype);
  } else if (target() >= Target::kAVX2) {
    unit = project_unit_avx2(dtype);
  }
#endif
  if (unit == nullptr) return nullptr;
  return soft ? unit->soft : unit->hard;
}

}  // namespace

void project(const void* weight, const Weight& shape, bool soft, double scale, void* dense,
             void* values, uint8_t* indices, int threads) {
  const ProjectRow wide = wide_row(shape.dtype, soft);
  const int64_t row_bytes = shape.k * size_of(shape.dtype);
  // So many rows are packed while they are in the first or the second cache.
  const int64_t at_once = std::max<int64_t>(1, (32 << 10) / row_bytes);
  visit_floats(shape.dtype, [&]<class T>(T) {
    const int team = threads_for_bytes(threads, 3 * shape.n * row_bytes);
    parallel_ranges(team, shape.n, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += at_once) {
        const int64_t rows = std::min(at_once, end - first);
        for (int64_t n = first; n < first + rows; ++n) {
          const T* w = static_cast<const T*>(weight) + n * shape.k;
          T* out = static_cast<T*>(dense) + n * shape.k;
          int64_t column = 0;
          if (wide != nullptr) column = wide(w, shape.k, static_cast<float>(scale), out);
          for (; column < shape.k; column += 4)
            project_group(w + column, std::min<int64_t>(4, shape.k - column), soft, scale,
                          out + column);
        }
        const Weight part{shape.dtype, rows, shape.k, nullptr, nullptr, nullptr};
        from_dense(static_cast<T*>(dense) + first * shape.k, part,
                   static_cast<T*>(values) + first * shape.value_columns(),
                   indices + first * shape.index_bytes(), 1);
      }
    });
  });
}

void add_dropped(const void* weight, const void* kept, int64_t count, DType dtype, double factor,
                 void* gradient, int threads) {
  visit_floats(dtype, [&]<class T>(T) {
    using A = decltype(to_float(T{}));
    const auto a = static_cast<A>(factor);
    const auto* w = static_cast<const T*>(weight);
    const auto* p = static_cast<const T*>(kept);
    auto* g = static_cast<T*>(gradient);
    const int team = threads_for_bytes(threads, 4 * count * size_of(dtype));
    parallel_ranges(team, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        round_to(to_float(g[i]) + a * (to_float(w[i]) - to_float(p[i])), g[i]);
    });
  });
}

}  // namespace gossamer::sparse24
