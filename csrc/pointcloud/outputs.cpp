// The outputs that a strided or transposed layer makes: candidates of each input, sorted, each
// once.
#include <algorithm>
#include <limits>

#include "common/ceil_div.h"
#include "pointcloud/maps.h"
#include "pointcloud/radix_sort.h"

namespace gossamer::pointcloud {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// What one axis makes of an input's coordinate: up to `kernel` outputs, ascending steps apart.
struct Axis {
  Rule rule;
  int64_t kernel, stride, padding, dilation;
  int64_t low, high;  // of the outputs that count

  template <class Visit>
  void for_outputs(int64_t input, const Visit& visit) const {
    const auto visit_inside = [&](int64_t output) {
      if (output >= low && output <= high) visit(output);
    };
    if (rule == Rule::kFloored) {
      visit_inside(floor_div(input, stride));
    } else if (rule == Rule::kSpread) {
      for (int64_t t = 0; t < kernel; ++t) {
        visit_inside(input * stride - padding + t * dilation);
      }
    } else {
      for (int64_t t = 0; t < kernel; ++t) {
        const int64_t scaled = input + padding - t * dilation;
        if (scaled % stride == 0) visit_inside(scaled / stride);
      }
    }
  }
  // Of all inputs between two.
  void bound(int64_t least, int64_t most) {
    const int64_t reach = (kernel - 1) * dilation;
    if (rule == Rule::kFloored) {
      low = floor_div(least, stride), high = floor_div(most, stride);
    } else if (rule == Rule::kSpread) {
      low = least * stride - padding, high = most * stride - padding + reach;
    } else {
      low = -floor_div(-(least + padding - reach), stride),
      high = floor_div(most + padding, stride);
    }
  }
};

struct Layer {
  int columns;
  Axis axes[kMostColumns - 1];
  Box box;  // of the outputs

  Layer(const Box& inputs, const Window& window, Rule rule, const int64_t* shape)
      : columns(inputs.columns), box(inputs) {
    for (int a = 0; a + 1 < columns; ++a) {
      Axis& axis = axes[a];
      axis = {rule, window.kernel[a], window.stride[a], window.padding[a], window.dilation[a], 0,
              0};
      axis.bound(inputs.low[a + 1], inputs.high[a + 1]);
      if (shape) axis.low = std::max<int64_t>(axis.low, 0);
      if (shape) axis.high = std::min(axis.high, shape[a] - 1);
      GOSSAMER_CHECK(axis.low > axis.high || (axis.low >= std::numeric_limits<int32_t>::min() &&
                                              axis.high <= std::numeric_limits<int32_t>::max()),
                     "pointcloud: output coordinates from ", axis.low, " to ", axis.high,
                     " along axis ", a, " leave the range of int32");
      box.low[a + 1] = axis.low, box.high[a + 1] = axis.high;
    }
  }

  // Calls visit(key) for the candidates of an input, those along the last axis in a row.
  template <class Visit>
  void for_keys(const int32_t* input, const KeySpace& space, const Visit& visit) const {
    from_axis(0, input, static_cast<uint64_t>(input[0] - box.low[0]) * space.step(0), space, visit);
  }

 private:
  template <class Visit>
  void from_axis(int a, const int32_t* input, uint64_t key, const KeySpace& space,
                 const Visit& visit) const {
    axes[a].for_outputs(input[a + 1], [&](int64_t output) {
      const uint64_t with = key + static_cast<uint64_t>(output - axes[a].low) * space.step(a + 1);
      if (a + 2 == columns) {
        visit(with);
      } else {
        from_axis(a + 1, input, with, space, visit);
      }
    });
  }
};

Box cells_of(const Box& box) {
  if (!box.empty()) return box;
  Box none;
  none.columns = box.columns;
  return none;
}

}  // namespace

Outputs::Outputs(const Rows& inputs, const Box& input_box, const Window& window, Rule rule,
                 const int64_t* shape, int threads)
    : space_(cells_of(Layer(input_box, window, rule, shape).box)),
      columns_(inputs.columns),
      candidates_(0),
      parts_(1),
      first_{0, 0} {
  const Layer layer(input_box, window, rule, shape);
  if (inputs.count == 0 || layer.box.empty()) return;
  const int input_parts = parts_of(threads, inputs.count);
  std::vector<int64_t> places(input_parts + 1, 0);
  for_parts(input_parts, inputs.count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      layer.for_keys(inputs.at_rank(i), space_, [&](uint64_t) { ++n; });
    }
    places[part + 1] = n;
  });
  for (int part = 0; part < input_parts; ++part) places[part + 1] += places[part];
  candidates_ = places[input_parts];
  keys_ = std::make_unique_for_overwrite<uint64_t[]>(candidates_);
  for_parts(input_parts, inputs.count, [&](int64_t part, int64_t begin, int64_t end) {
    uint64_t* to = keys_.get() + places[part];
    for (int64_t i = begin; i < end; ++i) {
      layer.for_keys(inputs.at_rank(i), space_, [&](uint64_t key) { *to++ = key; });
    }
  });
  radix_sort(keys_, candidates_, 0, space_.bits(), threads, [](uint64_t key) { return key; });
  parts_ = parts_of(threads, candidates_);
  first_.assign(parts_ + 1, 0);
  for_parts(parts_, candidates_, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) n += i == 0 || keys_[i] != keys_[i - 1];
    first_[part + 1] = n;
  });
  for (int part = 0; part < parts_; ++part) first_[part + 1] += first_[part];
}

void Outputs::write(int32_t* coords) const {
  if (candidates_ == 0) return;
  for_parts(parts_, candidates_, [&](int64_t part, int64_t begin, int64_t end) {
    int32_t* to = coords + first_[part] * columns_;
    for (int64_t i = begin; i < end; ++i) {
      if (i > 0 && keys_[i] == keys_[i - 1]) continue;
      space_.coordinate(keys_[i], to);
      to += columns_;
    }
  });
}

}  // namespace gossamer::pointcloud
