// Splits sums of rows over the threads, and where rows are met often, over tiles of the matrix.
//
// Each row of a large matrix comes from memory for every pair that names it. Tiles of kSlice
// columns and as many rows as half of L2 holds are copied there once; all pairs that name one of
// their rows then read it near by. The sums of the bags wait in between:
//
//   matrix    slice 0   slice 1
//   block 0  | tile  |         |    for each slice: for each block: copy the tile; for each bag:
//   block 1  |       |         |      sums[bag] += scale * tile[row], over its pairs in the block
//   block 2  |       |         |    then out[:, slice] = sums
#include "actsparse/topk.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "actsparse/topk_unit.h"
#include "common/cache_size.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"

namespace gossamer::actsparse::topk {
namespace {

thread_local Scratch tile_scratch, sums_scratch, x_scratch;

int64_t begin_of(const Bags& args, int64_t bag) {
  return args.begins == nullptr ? bag * args.k : args.begins[bag];
}

// The pairs of all bags by the block of rows they lie in, within a block as they were.
struct Blocks {
  std::vector<int64_t> begins;  // [blocks * bags + 1]
  std::vector<uint32_t> rows;   // within their block
  std::vector<float> scales;
};

Blocks sort_by_block(const Bags& args, int64_t blocks, int block_bits) {
  const int64_t pairs = begin_of(args, args.bags);
  Blocks sorted;
  sorted.begins.assign(blocks * args.bags + 1, 0);
  sorted.rows.resize(pairs);
  sorted.scales.resize(pairs);
  const auto for_pairs = [&](int64_t first, int64_t last, const auto& body) {
    for (int64_t bag = first; bag < last; ++bag) {
      for (int64_t i = begin_of(args, bag); i < begin_of(args, bag + 1); ++i) {
        const auto block = static_cast<int64_t>(args.rows[i] >> block_bits);
        body(i, block, sorted.begins[block * args.bags + bag]);
      }
    }
  };
  const int threads = threads_for_bytes(args.threads, pairs * int64_t{8});
  parallel_ranges(threads, args.bags, [&](int64_t first, int64_t last) {
    for_pairs(first, last, [](int64_t, int64_t, int64_t& count) { ++count; });
  });
  int64_t before = 0;
  for (int64_t& entry : sorted.begins) before += std::exchange(entry, before);
  // Each entry moves from its bag's begin to its end,
  parallel_ranges(threads, args.bags, [&](int64_t first, int64_t last) {
    for_pairs(first, last, [&](int64_t i, int64_t, int64_t& at) {
      sorted.rows[at] = args.rows[i] & ((1u << block_bits) - 1);
      sorted.scales[at++] = static_cast<const float*>(args.scales)[i];
    });
  });
  // which is the next one's begin.
  std::copy_backward(sorted.begins.begin(), sorted.begins.end() - 1, sorted.begins.end());
  sorted.begins[0] = 0;
  return sorted;
}

class Tiles {
 public:
  Tiles(const Bags& args, const Unit& unit) : args_(args), unit_(unit) {
    size_ = size_of(args.dtype);
    while (kSlice * size_ << (block_bits_ + 1) <= l2_bytes() / 2) ++block_bits_;
    block_rows_ = std::min(int64_t{1} << block_bits_, args.matrix_rows);
    blocks_ = ceil_div(args.matrix_rows, int64_t{1} << block_bits_);
    slices_ = ceil_div(args.columns, kSlice);
  }

  // From how many uses of a row on tiles are faster than whole rows from memory was measured on two
  // cores of Zen 3; rows of 16 bits cost less to read, and as long to add from a tile.
  // Sums are read and written once for each block, and out in short pieces.
  bool worth_it() const {
    const int64_t pairs = begin_of(args_, args_.bags);
    const int64_t least_uses = size_ == 2 ? 12 : 6;  // of a row
    return args_.columns >= kSlice && args_.matrix_rows * args_.columns * size_ > l2_bytes() &&
           pairs >= least_uses * args_.matrix_rows &&
           pairs >= args_.bags * std::max<int64_t>(blocks_, 8);
  }

  void run() const {
    Blocks sorted;
    if (blocks_ > 1) sorted = sort_by_block(args_, blocks_, block_bits_);
    // Threads take slices, each with its own tiles, and share one only where slices are few.
    const int64_t parts = ceil_div(args_.threads, slices_);
    parallel_ranges(args_.threads, slices_ * parts, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task % parts;
        run_slice(sorted, task / parts, args_.bags * part / parts, args_.bags * (part + 1) / parts);
      }
    });
  }

 private:
  // The sums of so many bags wait: few stay in L1, where one block is all there is.
  int64_t bags_at_once() const { return blocks_ == 1 ? 32 : 8192; }

  void run_slice(const Blocks& sorted, int64_t slice, int64_t first, int64_t last) const {
    if (first >= last) return;
    const int64_t column = slice * kSlice, columns = std::min(kSlice, args_.columns - column);
    auto* tile = static_cast<char*>(tile_scratch.at_least(block_rows_ * kSlice * size_));
    const int64_t most = std::min(bags_at_once(), last - first);
    // A register past the last sum may be read.
    auto* sums = static_cast<float*>(sums_scratch.at_least((most + 1) * kSlice * 4));
    for (int64_t bag = first; bag < last; bag += most) {
      const int64_t bags = std::min(most, last - bag);
      for (int64_t block = 0; block < blocks_; ++block) {
        if (blocks_ > 1 || bag == first) copy(block, column, columns, tile);
        TileSums task{tile, args_.k, nullptr, args_.rows, nullptr, bags, sums, block > 0};
        task.scales = static_cast<const float*>(args_.scales);
        if (blocks_ > 1) {
          task.begins = sorted.begins.data() + block * args_.bags + bag;
          task.rows = sorted.rows.data();
          task.scales = sorted.scales.data();
        } else if (args_.begins != nullptr) {
          task.begins = args_.begins + bag;
        } else {
          task.rows += bag * args_.k;
          task.scales += bag * args_.k;
        }
        unit_.sum_tile(task);
      }
      const auto* bias = static_cast<const char*>(args_.bias);
      unit_.finish({bias == nullptr ? nullptr : bias + column * size_, Activation::kNone,
                    static_cast<char*>(args_.out) + (bag * args_.columns + column) * size_,
                    args_.columns, columns},
                   sums, bags);
    }
  }

  void copy(int64_t block, int64_t column, int64_t columns, char* tile) const {
    const int64_t first = block << block_bits_;
    const int64_t rows = std::min(block_rows_, args_.matrix_rows - first);
    const char* from =
        static_cast<const char*>(args_.matrix) + (first * args_.stride + column) * size_;
    for (int64_t r = 0; r < rows; ++r, from += args_.stride * size_, tile += kSlice * size_) {
      // Rows lie on pages of their own, where the hardware's prefetch does not look ahead.
      constexpr int64_t kAhead = 8;
      for (int64_t c = 0; c < kSlice * size_; c += 64) {
        __builtin_prefetch(from + kAhead * args_.stride * size_ + c);
      }
      if (columns == kSlice) {
        for (int64_t c = 0; c < kSlice * size_; c += 128) std::memcpy(tile + c, from + c, 128);
      } else {
        std::memset(tile, 0, kSlice * size_);
        std::memcpy(tile, from, columns * size_);
      }
    }
  }

  const Bags& args_;
  const Unit& unit_;
  int block_bits_ = 0;  // rows of a block, as a power of 2
  int64_t size_, blocks_, block_rows_, slices_;
};

constexpr int64_t kPadding = 16;  // the widest register

float* sums_of_strip() {
  return static_cast<float*>(sums_scratch.at_least((kStripColumns + kPadding) * 4));
}

// Where the bag lies at which `share` of the work is done, an empty bag being worth two pairs.
int64_t bag_at(const Bags& args, int64_t share, int64_t of) {
  const auto work = [&](int64_t bag) { return begin_of(args, bag) + 2 * bag; };
  const int64_t wanted = work(args.bags) / of * share + work(args.bags) % of * share / of;
  int64_t low = 0, high = args.bags;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work(middle) < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Of values by their bits.
template <class Bits, class Body>
void for_codes(const DenseCodes& args, const Body& body) {
  const int64_t bytes = args.tokens * (args.width + args.k) * int64_t{sizeof(Bits)};
  parallel_ranges(threads_for_bytes(args.threads, bytes), args.tokens, body);
}

template <class Bits>
bool scatter_bits(const DenseCodes& args) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  std::atomic<bool> repeated{false};
  for_codes<Bits>(args, [&](int64_t first, int64_t last) {
    Bits before = 0;  // what lay where a value came to lie
    for (int64_t t = first; t < last; ++t) {
      const uint32_t* rows = args.rows + t * args.k;
      const Bits* from = static_cast<const Bits*>(args.from) + t * args.k;
      Bits* to = static_cast<Bits*>(args.to) + t * args.width;
      std::memset(to, 0, args.width * sizeof(Bits));
      for (int64_t j = 0; j < args.k; ++j) {
        before |= to[rows[j]];
        to[rows[j]] = from[j];
      }
    }
    if ((before & kMagnitude) != 0) repeated = true;
  });
  return !repeated;
}

template <class Bits>
void gather_bits(const DenseCodes& args) {
  for_codes<Bits>(args, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const uint32_t* rows = args.rows + t * args.k;
      const Bits* from = static_cast<const Bits*>(args.from) + t * args.width;
      Bits* to = static_cast<Bits*>(args.to) + t * args.k;
      for (int64_t j = 0; j < args.k; ++j) to[j] = from[rows[j]];
    }
  });
}

}  // namespace

bool scatter(const DenseCodes& args) {
  switch (size_of(args.dtype)) {
    case 2: return scatter_bits<uint16_t>(args);
    case 4: return scatter_bits<uint32_t>(args);
    default: return scatter_bits<uint64_t>(args);
  }
}

void gather(const DenseCodes& args) {
  switch (size_of(args.dtype)) {
    case 2: return gather_bits<uint16_t>(args);
    case 4: return gather_bits<uint32_t>(args);
    default: return gather_bits<uint64_t>(args);
  }
}

const Unit* unit_in_force(DType dtype) {
#ifdef GOSSAMER_X86
  switch (target()) {
    case Target::kSerial: return nullptr;
    case Target::kAVX2: return unit_avx2(dtype);
    default: return unit_avx512(dtype);
  }
#endif
  (void)dtype;
  return nullptr;
}

void sum_bags(const Bags& args) {
  const Unit* unit = unit_in_force(args.dtype);
  if (unit == nullptr) return sum_bags_serial(args);
  if (args.bags == 0 || args.columns == 0) return;
  const Tiles tiles(args, *unit);
  if (tiles.worth_it()) return tiles.run();
  const int64_t touched = begin_of(args, args.bags) + args.bags;
  const int threads = threads_for_bytes(args.threads, touched * args.columns * size_of(args.dtype));
  constexpr int64_t kBagsEach = 4;  // with fewer a thread, threads share the columns of all bags
  if (args.bags >= kBagsEach * threads) {
    parallel_run(threads, [&](int thread, int team) {
      const int64_t first = bag_at(args, thread, team), last = bag_at(args, thread + 1, team);
      unit->sum(args, first, last, 0, args.columns, sums_of_strip());
    });
  } else {
    parallel_ranges(threads, ceil_div(args.columns, kSlice), [&](int64_t first, int64_t last) {
      const int64_t end = std::min(last * kSlice, args.columns);
      unit->sum(args, 0, args.bags, first * kSlice, end, sums_of_strip());
    });
  }
}

void widen(DType dtype, const void* from, int64_t count, float* to, int threads) {
  const Unit* unit = unit_in_force(dtype);
  parallel_ranges(threads_for_bytes(threads, count * 2), count, [&](int64_t first, int64_t last) {
    const auto* values = static_cast<const char*>(from) + first * 2;
    if (unit != nullptr) return unit->widen(values, last - first, to + first);
    for (int64_t i = first; i < last; ++i, values += 2) {
      to[i] = dtype == DType::kBFloat16 ? to_float(*reinterpret_cast<const BFloat16*>(values))
                                        : to_float(*reinterpret_cast<const Float16*>(values));
    }
  });
}

void dot_rows(const Dots& args) {
  const Unit* unit = unit_in_force(args.dtype);
  if (unit == nullptr) return dot_rows_serial(args);
  const int64_t pairs = args.tokens * args.k;
  const int threads = threads_for_bytes(args.threads, pairs * args.columns * size_of(args.dtype));
  parallel_ranges(threads, args.tokens, [&](int64_t first, int64_t last) {
    unit->dot(args, first, last,
              static_cast<float*>(x_scratch.at_least((args.columns + kPadding) * 4)));
  });
}

// A counting sort. Each of a few parts of the tokens counts on its own; by row and then by part,
// the counts become where each part begins.
template <class Real>
ByRow<Real> sort_by_row(const uint32_t* rows, const Real* scales, int64_t tokens, int64_t k,
                        int64_t matrix_rows, int threads) {
  ByRow<Real> sorted;
  sorted.begins.resize(matrix_rows + 1);
  sorted.tokens.resize(tokens * k);
  sorted.scales.resize(tokens * k);
  const int64_t parts = std::clamp<int64_t>(tokens * k / matrix_rows, 1, threads);
  std::vector<std::vector<int64_t>> at(parts, std::vector<int64_t>(matrix_rows));
  const auto for_parts = [&](const auto& body) {
    parallel_ranges(static_cast<int>(parts), parts, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; ++t) {
          for (int64_t i = t * k; i < (t + 1) * k; ++i) body(t, i, at[part][rows[i]]);
        }
      }
    });
  };
  for_parts([](int64_t, int64_t, int64_t& count) { ++count; });
  int64_t before = 0;
  for (int64_t row = 0; row < matrix_rows; ++row) {
    sorted.begins[row] = before;
    for (auto& part : at) before += std::exchange(part[row], before);
  }
  sorted.begins[matrix_rows] = before;
  for_parts([&](int64_t t, int64_t i, int64_t& to) {
    sorted.tokens[to] = static_cast<uint32_t>(t);
    sorted.scales[to++] = scales[i];
  });
  return sorted;
}

template ByRow<float> sort_by_row(const uint32_t*, const float*, int64_t, int64_t, int64_t, int);
template ByRow<double> sort_by_row(const uint32_t*, const double*, int64_t, int64_t, int64_t, int);

}  // namespace gossamer::actsparse::topk
