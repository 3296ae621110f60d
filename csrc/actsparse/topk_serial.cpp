// The readable definition, for every dtype and any machine.
#include <algorithm>
#include <numeric>

#include "actsparse/topk.h"

namespace gossamer::actsparse::topk {
namespace {

template <class T>
using Real = decltype(to_float(T{}));  // double for double, float for the rest

template <class T>
void sum(const Bags& b) {
  const auto* matrix = static_cast<const T*>(b.matrix);
  const auto* scales = static_cast<const Real<T>*>(b.scales);
  const auto* bias = static_cast<const T*>(b.bias);
  std::vector<Real<T>> sums(b.columns);
  for (int64_t bag = 0; bag < b.bags; ++bag) {
    const int64_t begin = b.begins == nullptr ? bag * b.k : b.begins[bag];
    const int64_t end = b.begins == nullptr ? begin + b.k : b.begins[bag + 1];
    std::fill(sums.begin(), sums.end(), Real<T>(0));
    for (int64_t i = begin; i < end; ++i) {
      const T* row = matrix + b.rows[i] * b.stride;
      for (int64_t c = 0; c < b.columns; ++c) sums[c] += scales[i] * to_float(row[c]);
    }
    T* out = static_cast<T*>(b.out) + bag * b.columns;
    for (int64_t c = 0; c < b.columns; ++c) {
      round_to(bias == nullptr ? sums[c] : sums[c] + to_float(bias[c]), out[c]);
    }
  }
}

template <class T>
void dot(const Dots& d) {
  for (int64_t t = 0; t < d.tokens; ++t) {
    const T* x = static_cast<const T*>(d.x) + t * d.x_stride;
    for (int64_t i = t * d.k; i < (t + 1) * d.k; ++i) {
      const T* row = static_cast<const T*>(d.matrix) + d.rows[i] * d.stride;
      Real<T> sum = 0;
      for (int64_t c = 0; c < d.columns; ++c) sum += to_float(x[c]) * to_float(row[c]);
      round_to(sum, static_cast<T*>(d.out)[i]);
    }
  }
}

template <class T>
void select_largest(const Selection& s) {
  std::vector<int64_t> order(s.width);
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* dense = static_cast<const T*>(s.dense) + r * s.width;
    const auto before = [dense](int64_t a, int64_t b) {
      const auto x = to_float(dense[a]), y = to_float(dense[b]);
      const bool x_nan = x != x, y_nan = y != y;
      if (x_nan != y_nan) return x_nan;
      return x_nan || x == y ? a < b : x > y;
    };
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + s.k, order.end(), before);
    for (int64_t j = 0; j < s.k; ++j) {
      const T value = dense[order[j]];
      static_cast<T*>(s.values)[r * s.k + j] = s.relu && to_float(value) < 0 ? T{} : value;
      s.indices[r * s.k + j] = order[j];
    }
  }
}

}  // namespace

void sum_bags_serial(const Bags& args) {
  switch (args.dtype) {
    case DType::kFloat64: return sum<double>(args);
    case DType::kFloat32: return sum<float>(args);
    case DType::kBFloat16: return sum<BFloat16>(args);
    case DType::kFloat16: return sum<Float16>(args);
    default: return;  // refused at the border
  }
}

void dot_rows_serial(const Dots& args) {
  switch (args.dtype) {
    case DType::kFloat64: return dot<double>(args);
    case DType::kFloat32: return dot<float>(args);
    case DType::kBFloat16: return dot<BFloat16>(args);
    case DType::kFloat16: return dot<Float16>(args);
    default: return;
  }
}

void select_serial(const Selection& args) {
  switch (args.dtype) {
    case DType::kFloat64: return select_largest<double>(args);
    case DType::kFloat32: return select_largest<float>(args);
    case DType::kBFloat16: return select_largest<BFloat16>(args);
    case DType::kFloat16: return select_largest<Float16>(args);
    default: return;
  }
}

}  // namespace gossamer::actsparse::topk
