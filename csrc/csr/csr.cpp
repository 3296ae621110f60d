// Cuts the products into tasks and hands them to the kernels of the target in force.
#include "csr/csr.h"

#include <algorithm>

#include "common/cache_size.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "csr/unit.h"

namespace gossamer::csr {
namespace {

const Unit* unit_of(Target target, DType dtype) {
#ifdef GOSSAMER_X86
  if (target >= Target::kAVX512) return unit_avx512(dtype);
  if (target == Target::kAVX2) return unit_avx2(dtype);
#endif
  (void)target, (void)dtype;
  return nullptr;
}

thread_local Scratch x_panels, dy_panels, x_rows, block_sums, all_sums;

float* floats(Scratch& scratch, int64_t count) {
  return static_cast<float*>(scratch.at_least(count * int64_t{sizeof(float)}));
}

// Calls body(first, last) with the rows of W, at most kBlockRows at a time, each thread those of
// its share of what is stored. A row costs about as much as so many of its places.
template <class Body>
void for_row_blocks(const Pattern& pattern, int threads, double multiply_adds, const Body& body) {
  constexpr int64_t kRowCost = 8;
  const int64_t total = pattern.nnz() + kRowCost * pattern.n;
  const auto row_at = [&](int64_t cost) {  // the first row that begins there or later
    int64_t low = 0, high = pattern.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (pattern.crow[middle] + kRowCost * middle < cost) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_run(threads_for_work(threads, multiply_adds), [&](int thread, int team) {
    const int64_t begin = thread == 0 ? 0 : row_at(total / team * thread);
    const int64_t end = thread == team - 1 ? pattern.n : row_at(total / team * (thread + 1));
    for (int64_t first = begin; first < end; first += kBlockRows) {
      body(first, std::min<int64_t>(first + kBlockRows, end));
    }
  });
}

// Columns of a pass: all of them where they take no more than half of L2, so that W is read in its
// order in memory; else those whose part of a panel lies about in L1, where a row of W has enough
// places there to pay for the start of a loop and the way of its sums; else a small part of L2, or
// half of it; else all of them. Measured on Emerald Rapids, W of 1 to 50 % and 4 to 128 rows of x.
int64_t pass_width(const Pattern& pattern, int tile) {
  constexpr int64_t kFewest = 16;
  const double places = static_cast<double>(pattern.nnz()) / static_cast<double>(pattern.n);
  const int64_t column = tile * int64_t{sizeof(float)};
  if (pattern.k <= l2_bytes() / 2 / column) return pattern.k;
  for (int64_t bytes : {l1_bytes() * 4 / 3, l2_bytes() / 10, l2_bytes() / 2}) {
    const int64_t width = std::max<int64_t>(bytes / column, 1);
    if (width >= pattern.k) return pattern.k;
    if (places * static_cast<double>(width) >= static_cast<double>(kFewest * pattern.k)) {
      return width;
    }
  }
  return std::min<int64_t>(pattern.k, INT32_MAX / tile);  // offsets within a pass are 32-bit
}

void pack_panels(const Unit& unit, const void* data, DType dtype, int64_t stride, int64_t rows,
                 int64_t columns, int tile, int panels, int threads, float* to) {
  parallel_run(threads_for_bytes(threads, rows * columns * 4), [&](int thread, int team) {
    const int64_t begin = columns * thread / team, end = columns * (thread + 1) / team;
    for (int panel = 0; panel < panels; ++panel) {
      const int64_t first = int64_t{panel} * tile;
      const auto* from = static_cast<const char*>(data) + first * stride * size_of(dtype);
      unit.pack({from, stride, rows - first, columns}, begin, end, tile,
                to + panel * columns * tile);
    }
  });
}

void linear_gather(const LinearArgs& args, const Unit& unit) {
  const Pattern& pattern = args.pattern;
  const int64_t size = size_of(args.dtype), stride = pattern.k + 1;
  const auto tokens = static_cast<int>(args.rows);
  float* x = floats(x_rows, tokens * stride + 1) + 1;
  for (int t = 0; t < tokens; ++t) {
    unit.widen(static_cast<const char*>(args.x) + t * args.x_stride * size, pattern.k,
               x + t * stride);
    x[t * stride - 1] = 0;
  }
  const double work = static_cast<double>(pattern.nnz()) * 4;
  for_row_blocks(pattern, args.threads, work, [&](int64_t first, int64_t last) {
    const auto* bias = static_cast<const char*>(args.bias);
    unit.gather({pattern,
                 args.values,
                 first,
                 last,
                 x,
                 stride,
                 tokens,
                 {bias == nullptr ? nullptr : bias + first * size, args.activation,
                  static_cast<char*>(args.out) + first * size, pattern.n, last - first}});
  });
}

void linear_tokens(const LinearArgs& args, const Unit& unit) {
  constexpr int64_t kGroup = 128;  // rows of x at a time: whose panels and sums fit L2
  const Pattern& pattern = args.pattern;
  const int64_t size = size_of(args.dtype);
  const int64_t groups = ceil_div(args.rows, kGroup), group = ceil_div(args.rows, groups);
  const int most = unit.most_registers * unit.lanes;
  const auto panels = static_cast<int>(ceil_div(group, most));
  const auto tile = static_cast<int>(ceil_div(ceil_div(group, panels), unit.lanes) * unit.lanes);
  const int64_t width = pass_width(pattern, tile);
  float* x = floats(x_panels, panels * pattern.k * tile);
  for (int64_t token = 0; token < args.rows; token += group) {
    const int64_t tokens = std::min(group, args.rows - token);
    pack_panels(unit, static_cast<const char*>(args.x) + token * args.x_stride * size, args.dtype,
                args.x_stride, tokens, pattern.k, tile, static_cast<int>(ceil_div(tokens, tile)),
                args.threads, x);
    const double work = static_cast<double>(pattern.nnz()) * static_cast<double>(tokens);
    for_row_blocks(pattern, args.threads, work, [&](int64_t first, int64_t last) {
      float* sums = floats(block_sums, int64_t{panels} * kBlockRows * tile + kSumsPast);
      const auto* bias = static_cast<const char*>(args.bias);
      auto* out = static_cast<char*>(args.out) + (token * pattern.n + first) * size;
      unit.tokens({pattern,
                   args.values,
                   first,
                   last,
                   x,
                   tile,
                   static_cast<int>(ceil_div(tokens, tile)),
                   tokens,
                   width,
                   sums,
                   {bias == nullptr ? nullptr : bias + first * size, args.activation, out,
                    pattern.n, last - first}});
    });
  }
}

const char* kernel_of(const Unit& unit, int64_t rows) {
  return rows <= unit.most_gathered ? "gather" : "tokens";
}

}  // namespace

void linear(const LinearArgs& args) {
  const Unit* unit = unit_of(target(), args.dtype);
  if (unit == nullptr) return linear_serial(args);
  if (args.rows == 0) return;
  if (args.rows <= unit->most_gathered) return linear_gather(args, *unit);
  linear_tokens(args, *unit);
}

void dvalues(const DvaluesArgs& args) {
  const Unit* found = unit_of(target(), args.dtype);
  if (found == nullptr || args.rows == 0) return dvalues_serial(args);
  const Unit& unit = *found;
  const Pattern& pattern = args.pattern;
  const int64_t size = size_of(args.dtype);
  const int most = unit.most_registers * unit.lanes;
  const int64_t groups = ceil_div(args.rows, most);
  const auto tile =
      static_cast<int>(ceil_div(ceil_div(args.rows, groups), unit.lanes) * unit.lanes);
  const int64_t width = pass_width(pattern, tile);
  float* x = floats(x_panels, pattern.k * tile);
  float* dy = floats(dy_panels, pattern.n * tile);
  float* sums =
      size == sizeof(float) ? static_cast<float*>(args.dvalues) : floats(all_sums, pattern.nnz());
  for (int64_t token = 0; token < args.rows; token += tile) {
    const int64_t tokens = std::min<int64_t>(tile, args.rows - token);
    const auto pack = [&](const void* data, int64_t stride, int64_t columns, float* to) {
      pack_panels(unit, static_cast<const char*>(data) + token * stride * size, args.dtype, stride,
                  tokens, columns, tile, 1, args.threads, to);
    };
    pack(args.x, args.x_stride, pattern.k, x);
    pack(args.dy, args.dy_stride, pattern.n, dy);
    const bool last_one = token + tile >= args.rows;
    const double work = static_cast<double>(pattern.nnz()) * static_cast<double>(tokens);
    for_row_blocks(pattern, args.threads, work, [&](int64_t first, int64_t last) {
      unit.dvalues({pattern, first, last, x, dy, tile, width, token > 0, sums,
                    last_one ? args.dvalues : nullptr});
    });
  }
}

Choice choose(int64_t rows, DType dtype) {
  const Target wanted = target();
  const Unit* unit = unit_of(wanted, dtype);
  if (unit == nullptr) {
    return {"serial", name(Target::kSerial),
            wanted == Target::kSerial ? "no vector target is in force"
                                      : "float64 has the serial kernel only"};
  }
  const Target owner = wanted >= Target::kAVX512 ? Target::kAVX512 : Target::kAVX2;
  const bool few = rows <= unit->most_gathered;
  return {kernel_of(*unit, rows), name(owner),
          few ? "so few rows of x are bound by reading the weight, which is read once"
              : "a value read once meets all rows of x in a panel"};
}

}  // namespace gossamer::csr
