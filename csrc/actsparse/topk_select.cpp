// The largest entries of rows. A vector kernel finds the few entries above the k-th largest so far;
// only those are looked at one by one.
#include <algorithm>
#include <functional>
#include <vector>

#include "actsparse/topk.h"
#include "actsparse/topk_unit.h"
#include "common/parallel.h"

namespace gossamer::actsparse::topk {
namespace {

// Of two entries the one that comes first has the larger key: its value in the upper half, as a
// number that compares as floats do, and below it the index, lower ones being larger.
uint64_t key_of(float value, uint32_t index) {
  uint32_t bits = float_to_bits(value == 0 ? 0.0f : value);  // -0 equals 0
  bits = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  if (value != value) bits = 0xffffffffu;
  return static_cast<uint64_t>(bits) << 32 | ~index;
}
float value_of(uint64_t key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  return bits_to_float((bits & 0x80000000u) != 0 ? bits & 0x7fffffffu : ~bits);
}
uint32_t index_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Keys of the k largest entries met so far, and of some smaller ones.
class Largest {
 public:
  explicit Largest(int64_t k) : k_(k), room_(std::max<int64_t>(k, 2 * kLeastRoom)) {
    keys_.reserve(k + room_);
    found_.resize(room_);
  }

  template <class T>
  const std::vector<uint64_t>& of_row(const Unit& unit, const T* dense, int64_t width) {
    keys_.clear();
    for (int64_t i = 0; i < k_; ++i) {
      keys_.push_back(key_of(to_float(dense[i]), static_cast<uint32_t>(i)));
    }
    uint64_t least = *std::min_element(keys_.begin(), keys_.end());
    for (int64_t at = k_; at < width;) {
      const int64_t room = k_ + room_ - static_cast<int64_t>(keys_.size());
      if (room < kLeastRoom) {
        keep_k();
        least = keys_.back();
        continue;
      }
      const int64_t count =
          unit.above(dense, at, width, value_of(least), found_.data(), std::min(room, room_));
      for (int64_t f = 0; f < count; ++f) {
        const uint64_t key = key_of(to_float(dense[found_[f]]), found_[f]);
        if (key > least) keys_.push_back(key);
      }
    }
    keep_k();
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    return keys_;
  }

 private:
  void keep_k() {  // the least of them last
    std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.end(), std::greater<>());
    keys_.resize(k_);
  }

  int64_t k_, room_;
  std::vector<uint64_t> keys_;
  std::vector<uint32_t> found_;
};

template <class T>
void select_rows(const Selection& s, const Unit& unit) {
  const int threads = threads_for_bytes(s.threads, s.rows * s.width * int64_t{sizeof(T)});
  parallel_ranges(threads, s.rows, [&](int64_t first, int64_t last) {
    Largest largest(s.k);
    for (int64_t r = first; r < last; ++r) {
      const T* dense = static_cast<const T*>(s.dense) + r * s.width;
      T* values = static_cast<T*>(s.values) + r * s.k;
      int64_t* indices = s.indices + r * s.k;
      for (const uint64_t key : largest.of_row(unit, dense, s.width)) {
        const T value = dense[index_of(key)];
        *values++ = s.relu && to_float(value) < 0 ? T{} : value;
        *indices++ = index_of(key);
      }
    }
  });
}

}  // namespace

void select(const Selection& args) {
  const Unit* unit = unit_in_force(args.dtype);
  if (unit == nullptr) return select_serial(args);
  switch (args.dtype) {
    case DType::kFloat32: return select_rows<float>(args, *unit);
    case DType::kBFloat16: return select_rows<BFloat16>(args, *unit);
    case DType::kFloat16: return select_rows<Float16>(args, *unit);
    default: return;
  }
}

}  // namespace gossamer::actsparse::topk
