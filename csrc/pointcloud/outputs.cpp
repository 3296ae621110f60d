// The outputs that a strided or transposed layer makes: marked in a map of bits where that is not
// much larger than the inputs, else all candidates sorted.
#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "pointcloud/maps.h"
#include "pointcloud/radix_sort.h"

namespace gossamer::pointcloud {
namespace {

// Bytes of bits that an input may cost: clearing and reading them is still less work than sorting
// the input's outputs.
constexpr int64_t kBitmapBytesPerInput = 128;
// A table has an entry for each remainder.
constexpr int64_t kMostStride = 1 << 16;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Outputs first, first + step, ...
struct Run {
  int64_t first, count, step;
};

// What one axis makes of an input's coordinate.
class Axis {
 public:
  int64_t low, high;  // of the outputs that count

  void set(Rule rule, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    rule_ = rule, kernel_ = kernel, stride_ = stride, padding_ = padding, dilation_ = dilation;
    shift_ = std::has_single_bit(static_cast<uint64_t>(stride))
                 ? std::countr_zero(static_cast<uint64_t>(stride))
                 : -1;
    if (rule == Rule::kReached) fill_table();
  }

  // The outputs of all inputs between two.
  void bound(int64_t least, int64_t most) {
    const int64_t reach = (kernel_ - 1) * dilation_;
    if (rule_ == Rule::kFloored) {
      low = floor_div(least, stride_), high = floor_div(most, stride_);
    } else if (rule_ == Rule::kSpread) {
      low = least * stride_ - padding_, high = most * stride_ - padding_ + reach;
    } else {
      low = -floor_div(-(least + padding_ - reach), stride_);
      high = floor_div(most + padding_, stride_);
    }
  }

  Run outputs(int64_t input) const {
    switch (rule_) {
      case Rule::kFloored: return inside({divided(input), 1, 1});
      case Rule::kSpread: return inside({input * stride_ - padding_, kernel_, dilation_});
      case Rule::kReached: break;
    }
    const int64_t quotient = divided(input + padding_);
    Run run = of_remainder_[input + padding_ - quotient * stride_];
    run.first += quotient;
    return inside(run);
  }

 private:
  int64_t divided(int64_t a) const { return shift_ >= 0 ? a >> shift_ : floor_div(a, stride_); }

  // input + padding = q stride + r has the outputs q + (r - t dilation) / stride, for the taps t
  // that leave no remainder: equally far apart.
  void fill_table() {
    GOSSAMER_CHECK(stride_ <= kMostStride, "pointcloud: stride ", stride_, " is more than ",
                   kMostStride, ", the most of the rule 'dense'");
    of_remainder_.assign(stride_, {0, 0, dilation_ / std::gcd(dilation_, stride_)});
    for (int64_t t = 0; t < kernel_; ++t) {
      Run& run = of_remainder_[t * dilation_ % stride_];
      run.first = -(t * dilation_ / stride_);  // falls with t
      ++run.count;
    }
  }

  Run inside(Run run) const {
    if (run.first < low) {
      const int64_t skipped = std::min((low - run.first + run.step - 1) / run.step, run.count);
      run.first += skipped * run.step, run.count -= skipped;
    }
    if (run.first + (run.count - 1) * run.step > high) {
      run.count = run.first > high ? 0 : (high - run.first) / run.step + 1;
    }
    return run;
  }

  Rule rule_;
  int64_t kernel_, stride_, padding_, dilation_;
  int shift_;
  std::vector<Run> of_remainder_;
};

struct Layer {
  int axis_count;
  Axis axes[kMostColumns - 1];
  Box box;  // of the outputs

  Layer(const Box& inputs, const Window& window, Rule rule, const int64_t* shape)
      : axis_count(inputs.columns - 1), box(inputs) {
    for (int a = 0; a < axis_count; ++a) {
      Axis& axis = axes[a];
      axis.set(rule, window.kernel[a], window.stride[a], window.padding[a], window.dilation[a]);
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

  // Calls visit(key, count, step) for the input's outputs along the last axis.
  template <class Visit>
  void for_runs(const int32_t* input, const KeySpace& space, const Visit& visit) const {
    // Rows that their owner has changed since the box was made stay inside of it.
    if (input[0] < box.low[0] || input[0] > box.high[0]) return;
    Run runs[kMostColumns - 1];
    uint64_t key = static_cast<uint64_t>(input[0] - box.low[0]) * space.step(0);
    for (int a = 0; a < axis_count; ++a) {
      runs[a] = axes[a].outputs(input[a + 1]);
      if (runs[a].count == 0) return;
      key += static_cast<uint64_t>(runs[a].first - box.low[a + 1]) * space.step(a + 1);
    }
    from_axis(0, runs, key, space, visit);
  }

 private:
  template <class Visit>
  void from_axis(int a, const Run* runs, uint64_t key, const KeySpace& space,
                 const Visit& visit) const {
    if (a + 1 == axis_count) return visit(key, runs[a].count, static_cast<uint64_t>(runs[a].step));
    const uint64_t step = static_cast<uint64_t>(runs[a].step) * space.step(a + 1);
    for (int64_t i = 0; i < runs[a].count; ++i, key += step) {
      from_axis(a + 1, runs, key, space, visit);
    }
  }
};

Box cells_of(const Box& box) {
  if (!box.empty()) return box;
  Box none;
  none.columns = box.columns;
  return none;
}

// Threads mark in any order, which leaves no trace; most bits are marked already when they come.
void mark(uint64_t* words, uint64_t key) {
  const uint64_t bit = uint64_t{1} << (key % 64);
  if ((__atomic_load_n(words + key / 64, __ATOMIC_RELAXED) & bit) == 0) {
    __atomic_fetch_or(words + key / 64, bit, __ATOMIC_RELAXED);
  }
}

}  // namespace

Box outputs_box(const Box& inputs, const Window& window, Rule rule, const int64_t* shape) {
  return Layer(inputs, window, rule, shape).box;
}

Outputs::Outputs(const Rows& inputs, const Box& input_box, const Window& window, Rule rule,
                 const int64_t* shape, int threads)
    : space_(cells_of(Layer(input_box, window, rule, shape).box)), columns_(inputs.columns) {
  const Layer layer(input_box, window, rule, shape);
  if (inputs.count > 0 && !layer.box.empty()) {
    const int parts = parts_of(threads, inputs.count);
    bitmap_ = space_.cells() / 8 / kBitmapBytesPerInput < static_cast<uint64_t>(inputs.count);
    const auto for_all = [&](const auto& visit) {
      for_parts(parts, inputs.count, [&](int64_t part, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          layer.for_runs(inputs.at_rank(i), space_, [&](uint64_t key, int64_t n, uint64_t step) {
            visit(part, key, n, step);
          });
        }
      });
    };
    if (bitmap_) {
      length_ = static_cast<int64_t>(space_.cells() / 64) + 1;
      words_ = std::make_unique<uint64_t[]>(length_);
      for_all([&](int64_t, uint64_t key, int64_t n, uint64_t step) {
        for (int64_t i = 0; i < n; ++i, key += step) mark(words_.get(), key);
      });
    } else {
      std::vector<int64_t> places(parts + 1, 0);
      for_all([&](int64_t part, uint64_t, int64_t n, uint64_t) { places[part + 1] += n; });
      for (int part = 0; part < parts; ++part) places[part + 1] += places[part];
      length_ = places[parts];
      words_ = std::make_unique_for_overwrite<uint64_t[]>(length_);
      for_all([&](int64_t part, uint64_t key, int64_t n, uint64_t step) {
        for (int64_t i = 0; i < n; ++i, key += step) words_[places[part]++] = key;
      });
      radix_sort(words_, length_, 0, space_.bits(), threads, [](uint64_t key) { return key; });
    }
  }
  parts_ = parts_of(threads, length_);
  first_.assign(parts_ + 1, 0);
  for_parts(parts_, length_, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      n += bitmap_ ? std::popcount(words_[i]) : i == 0 || words_[i] != words_[i - 1];
    }
    first_[part + 1] = n;
  });
  for (int part = 0; part < parts_; ++part) first_[part + 1] += first_[part];
}

void Outputs::write(int32_t* coords) const {
  for_parts(parts_, length_, [&](int64_t part, int64_t begin, int64_t end) {
    int32_t* to = coords + first_[part] * columns_;
    const auto put = [&](uint64_t key) {
      space_.coordinate(key, to);
      to += columns_;
    };
    for (int64_t i = begin; i < end; ++i) {
      if (bitmap_) {
        for (uint64_t bits = words_[i]; bits != 0; bits &= bits - 1) {
          put(static_cast<uint64_t>(i) * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
        }
      } else if (i == 0 || words_[i] != words_[i - 1]) {
        put(words_[i]);
      }
    }
  });
}

}  // namespace gossamer::pointcloud
