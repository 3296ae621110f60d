#pragma once
// A coordinate as one 64-bit number: the cells of a box counted, the last axis fastest, so that
// numbers ascend where coordinates do lexicographically and a step in the grid is a constant.
#include <cstdint>
#include <string>

#include "common/check.h"

namespace gossamer::pointcloud {

constexpr int kMostColumns = 5;  // the batch index and up to four axes

// The least and the greatest coordinate of each column, both inside.
struct Box {
  int columns = 0;
  int64_t low[kMostColumns] = {}, high[kMostColumns] = {};

  bool holds(const int64_t* coordinate) const {
    for (int c = 0; c < columns; ++c) {
      if (coordinate[c] < low[c] || coordinate[c] > high[c]) return false;
    }
    return true;
  }
  bool empty() const {
    for (int c = 0; c < columns; ++c) {
      if (low[c] > high[c]) return true;
    }
    return false;
  }
};

constexpr uint64_t kNoKey = UINT64_MAX;  // above every cell's

class KeySpace {
 public:
  explicit KeySpace(const Box& box) : box_(box) {
    unsigned __int128 cells = 1;
    for (int c = box.columns - 1; c >= 0; --c) {
      step_[c] = static_cast<uint64_t>(cells);
      cells *= static_cast<uint64_t>(box.high[c] - box.low[c] + 1);
      GOSSAMER_CHECK(cells <= UINT64_MAX, "pointcloud: coordinates from [", text(box.low), "] to [",
                     text(box.high),
                     "] (batch first, with the kernel's reach) are more cells than 64-bit keys "
                     "number, 2**64 - 1");
    }
    cells_ = static_cast<uint64_t>(cells);
  }

  uint64_t step(int column) const { return step_[column]; }
  uint64_t cells() const { return cells_; }
  // How many bits a key has.
  int bits() const { return cells_ <= 1 ? 0 : 64 - __builtin_clzll(cells_ - 1); }

  template <class Int>
  uint64_t key(const Int* coordinate) const {
    uint64_t sum = 0;
    for (int c = 0; c < box_.columns; ++c) {
      sum += static_cast<uint64_t>(coordinate[c] - box_.low[c]) * step_[c];
    }
    return sum;
  }

  void coordinate(uint64_t key, int32_t* out) const {
    for (int c = 0; c < box_.columns; ++c) {
      const uint64_t cell = key / step_[c];
      key -= cell * step_[c];
      out[c] = static_cast<int32_t>(static_cast<int64_t>(cell) + box_.low[c]);
    }
  }

 private:
  std::string text(const int64_t* side) const {
    std::string all;
    for (int c = 0; c < box_.columns; ++c) all += (c ? ", " : "") + std::to_string(side[c]);
    return all;
  }

  Box box_;
  uint64_t step_[kMostColumns] = {};
  uint64_t cells_ = 1;
};

}  // namespace gossamer::pointcloud
