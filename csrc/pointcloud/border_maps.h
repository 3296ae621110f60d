#pragma once
// The checks of coordinates that Python hands over. Included by api files only.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/border.h"
#include "common/py_tensor.h"
#include "pointcloud/maps.h"

namespace gossamer::pointcloud {

inline void check_ints(const char* op, const char* what, const TensorView& t, DType dtype) {
  check_on_cpu(op, what, t);
  check_dtype(op, what, t, dtype);
  check_contiguous(op, what, t);
}

inline void check_coords(const char* op, const char* what, const TensorView& coords) {
  check_matrix(op, what, coords);
  check_ints(op, what, coords, DType::kInt32);
  GOSSAMER_CHECK(coords.shape[1] >= 2 && coords.shape[1] <= kMostColumns, op, ": ", what,
                 " have shape ", shape_text(coords), ", expected 2 to 5 columns");
  GOSSAMER_CHECK(coords.shape[0] <= INT32_MAX, op, ": ", coords.shape[0], " voxels, at most ",
                 INT32_MAX);
}

inline Rows rows_of(const char* op, const char* what, const TensorView& coords,
                    const std::optional<TensorView>& order) {
  check_coords(op, what, coords);
  if (order) {
    check_vector(op, "order", *order, coords.shape[0]);
    check_ints(op, "order", *order, DType::kInt32);
  }
  return {coords.as<int32_t>(), order ? order->as<int32_t>() : nullptr, coords.shape[0],
          static_cast<int>(coords.shape[1])};
}

// A search holds this many taps' pairs of 1024 walkers at once: 256 MB.
constexpr int64_t kMostTaps = 1 << 15;
// Keeps the products of coordinates and sizes far from overflow.
constexpr int64_t kMostCells = 1 << 30;

using Sides = std::pair<std::vector<int64_t>, std::vector<int64_t>>;  // least, greatest

inline Box box_of(const char* op, const Sides& sides, int columns) {
  Box box;
  box.columns = columns;
  GOSSAMER_CHECK(
      std::cmp_equal(sides.first.size(), columns) && std::cmp_equal(sides.second.size(), columns),
      op, ": a box of ", sides.first.size(), " columns for coordinates of ", columns);
  for (int c = 0; c < columns; ++c) {
    box.low[c] = sides.first[c], box.high[c] = sides.second[c];
    GOSSAMER_CHECK(INT32_MIN <= box.low[c] && box.low[c] <= box.high[c] && box.high[c] <= INT32_MAX,
                   op, ": column ", c, " of the box runs from ", box.low[c], " to ", box.high[c]);
  }
  return box;
}

inline Window window_of(const char* op, const std::vector<std::vector<int64_t>>& sizes, int axes) {
  Window window;
  GOSSAMER_CHECK(sizes.size() == 4, op, ": a window of ", sizes.size(), " sizes, expected 4");
  const char* names[] = {"kernel_size", "stride", "padding", "dilation"};
  int64_t* places[] = {window.kernel, window.stride, window.padding, window.dilation};
  for (int i = 0; i < 4; ++i) {
    GOSSAMER_CHECK(std::cmp_equal(sizes[i].size(), axes), op, ": ", names[i], " has ",
                   sizes[i].size(), " axes, the coordinates ", axes);
    for (int a = 0; a < axes; ++a) {
      GOSSAMER_CHECK(sizes[i][a] >= (i == 2 ? 0 : 1) && sizes[i][a] <= kMostCells, op, ": ",
                     names[i], " is ", sizes[i][a], " along axis ", a, ", at most ", kMostCells);
      places[i][a] = sizes[i][a];
    }
  }
  int64_t taps = 1;
  for (int a = 0; a < axes; ++a) {
    taps *= window.kernel[a];
    GOSSAMER_CHECK(taps <= kMostTaps, op, ": a kernel of more than ", kMostTaps, " taps");
  }
  return window;
}

inline Rule rule_of(const char* op, const std::string& text) {
  if (text == "reached") return Rule::kReached;
  if (text == "floored") return Rule::kFloored;
  if (text == "spread") return Rule::kSpread;
  fail(op, ": no outputs '", text, "'; reached, floored or spread");
}

}  // namespace gossamer::pointcloud
