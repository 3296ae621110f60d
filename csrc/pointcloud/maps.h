#pragma once
// Coordinate sets, and the pairs of voxels that a convolution over them multiplies.
//
// A coordinate is a row [1 + D] of int32, the batch index first. A set keeps the rows as the user
// has them, and beside them the order that sorts them lexicographically. A tap of a kernel is a
// translation and keeps this order, so the pairs of a tap are a merge of two ascending lists:
//
//   targets   a   b c     d e f   g        sorted cells of the input
//   walkers +   -   - -     - -   -        sorted outputs, shifted by the tap
//   pairs         b           e   g        where both are
//
// and taps next to each other on the last axis look at neighbouring keys, found by one merge.
//
// Every result is the same at any number of threads.
#include <cstdint>
#include <memory>
#include <vector>

#include "pointcloud/keys.h"

namespace pybind11 {
class module_;
}

namespace gossamer::pointcloud {

// A set in ascending order: rank r is the row order[r], or r itself where order is null.
struct Rows {
  const int32_t* coords;  // [count, columns]
  const int32_t* order;
  int64_t count;
  int columns;

  const int32_t* at_rank(int64_t rank) const {
    return coords + (order ? order[rank] : rank) * columns;
  }
};

Box bounds(const int32_t* coords, int64_t count, int columns, int threads);

struct SortReport {
  bool ascending;          // the rows are sorted already, none repeats, and no order was written
  int64_t repeated;        // rows whose coordinates an earlier one has
  int64_t first_repeated;  // the first such row
};
// Fills order [count], stable.
SortReport sort(const int32_t* coords, int64_t count, const Box& box, int32_t* order, int threads);

// The geometry of a convolution: input = output * stride - padding + tap * dilation.
struct Window {
  int64_t kernel[kMostColumns - 1], stride[kMostColumns - 1], padding[kMostColumns - 1],
      dilation[kMostColumns - 1];
};

// The cells that a window of some walker at the box's border reaches.
inline Box with_reach(const Box& box, const Window& window) {
  Box reach = box;
  for (int a = 0; a + 1 < box.columns; ++a) {
    const int64_t r = (window.kernel[a] - 1) * window.dilation[a];
    reach.low[a + 1] -= r;
    reach.high[a + 1] += r;
  }
  return reach;
}

// The pairs of target = walker * stride - padding + tap * dilation, tap by tap, ascending in each.
class Pairs {
 public:
  // With `mirrored` walkers and targets are the same set and the window is a centred odd one of
  // stride 1: the taps before the centre are searched, and those after it are their transposes.
  Pairs(const Rows& walkers, const Rows& targets, const Box& target_box, const Window& window,
        bool mirrored, int threads);

  const std::vector<int64_t>& tap_offsets() const { return tap_offsets_; }  // [taps + 1]
  // walker_ranks and target_ranks [tap_offsets.back()].
  void write(int32_t* walker_ranks, int32_t* target_ranks, int threads) const;

 private:
  // Of some consecutive walkers: for each tap searched its walkers' ranks, then its targets'.
  struct Chunk {
    std::unique_ptr<int32_t[]> ranks;
    std::vector<int32_t> counts;  // [taps searched]
    std::vector<int64_t> places;  // [taps searched], where its pairs go
  };

  int64_t taps_, searched_, count_;  // of taps, taps searched, walkers
  std::vector<Chunk> chunks_;
  std::vector<int64_t> tap_offsets_;
};

// Which outputs a layer makes of its inputs.
enum class Rule : uint8_t {
  kReached,  // output * stride = input + padding - tap * dilation for some tap
  kFloored,  // floor(input / stride)
  kSpread,   // input * stride - padding + tap * dilation for some tap: a transposed convolution's
};

// The cells among which the outputs of inputs in a box lie, empty where there can be none.
Box outputs_box(const Box& inputs, const Window& window, Rule rule, const int64_t* shape);

// The outputs of some inputs, sorted, each once.
class Outputs {
 public:
  // shape [columns - 1] bounds the outputs to [0, shape), or is null.
  Outputs(const Rows& inputs, const Box& input_box, const Window& window, Rule rule,
          const int64_t* shape, int threads);

  int columns() const { return columns_; }
  int64_t count() const { return first_[parts_]; }
  void write(int32_t* coords) const;  // [count, columns]

 private:
  KeySpace space_;
  int columns_;
  bool bitmap_ = false;
  std::unique_ptr<uint64_t[]> words_;  // a bit a cell, or the keys of all candidates, sorted
  int64_t length_ = 0;                 // of words_
  int parts_;
  std::vector<int64_t> first_;  // [parts + 1], the rank at which each part of the words begins
};

void bind_maps(pybind11::module_& m);
void bind_maps_cuda(pybind11::module_& m);
void bind_voxelize(pybind11::module_& m);
void bind_voxelize_cuda(pybind11::module_& m);

}  // namespace gossamer::pointcloud
