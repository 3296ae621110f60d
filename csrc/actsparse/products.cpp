// Finds what is active, cuts the products into tasks and hands them to the kernels of the target in
// force.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "actsparse/unit.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"

namespace gossamer::actsparse {
namespace {

struct Choice {
  const Unit* unit;
  Target owner;
};

Choice choose(DType dtype) {
#ifdef GOSSAMER_X86
  if (target() >= Target::kAVX512BF16 && dtype == DType::kBFloat16) {
    return {unit_avx512_bf16(dtype), Target::kAVX512BF16};
  }
  if (target() >= Target::kAVX512) return {unit_avx512(dtype), Target::kAVX512};
  if (target() == Target::kAVX2) return {unit_avx2(dtype), Target::kAVX2};
#endif
  (void)dtype;
  return {nullptr, Target::kSerial};
}

thread_local Scratch sums, active_rows;

// Columns that a thread takes at once: whole lines of every dtype.
constexpr int64_t kBlockN = 64;

// The active rows of k, each part of the inputs by the thread that has time for it. In the scratch
// of the calling thread.
int64_t find_active(const Unit& unit, const Tokens& x, int64_t k, int threads, ActiveRow* rows) {
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = ceil_div(k, kChunk);
  std::vector<int64_t> counts(chunks);
  const int team = threads_for_work(threads, static_cast<double>(x.count * k) / 2);
  if (team == 1) return unit.find_active(x, 0, k, rows);
  parallel_ranges(team, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kChunk;
      counts[i] = unit.find_active(x, first, std::min(kChunk, k - first), rows + first);
    }
  });
  int64_t count = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    std::memmove(rows + count, rows + i * kChunk, counts[i] * sizeof(ActiveRow));
    count += counts[i];
  }
  return count;
}

int64_t find_wanted(const uint8_t* wanted, int64_t tokens, int64_t n, ActiveRow* rows) {
  int64_t count = 0;
  for (int64_t output = 0; output < n; ++output) {
    uint64_t bits = 0;
    for (int64_t t = 0; t < tokens; ++t) bits |= uint64_t{wanted[t * n + output] != 0} << t;
    rows[count] = {output, bits};
    count += bits != 0;
  }
  return count;
}

// Costs in readings of the whole weight from memory: of the rows that are read, of each token's
// sums, of a row that a token adds; and of a dense product, which is torch's, for the weight and
// each token. Measured on Emerald Rapids at 4096 x 14336 and 1 to 64 tokens; what torch does with
// fewer instructions by keeping oneDNN from the others, at 4096 x 4096.
struct Costs {
  double row, token, product, dense, dense_token;
};
// With a dense product of 16 bits by what torch has for them. CPUs with AMX have AVX-512's own
// float16, too. Without either the product goes through float32, whose weight is made in each call
// (measured on two cores of Zen 3).
Costs of_16_bits(Costs costs, DType dtype) {
  const Target best = target();
  if (best >= Target::kAMXBF16) {
    costs.dense_token = dtype == DType::kFloat16 ? 0.08 : costs.dense_token;
  } else if (best >= Target::kAVX512 && dtype == DType::kBFloat16) {
    costs.dense_token = best >= Target::kAVX512BF16 ? 0.2 : 0.7;
  } else {
    costs.dense = 20, costs.dense_token = 0.085;
  }
  return costs;
}

Costs linear_costs(DType dtype) {
  if (dtype == DType::kFloat32) return {1.1, 0.015, 0.12, 2.0, 0.044};
  return of_16_bits({1.1, 0.03, 0.15, 2.15, 0.007}, dtype);
}

// Beside the other layout of a dense weight.
Costs outputs_costs(DType dtype) {
  if (dtype == DType::kFloat32) return {1.1, 0.0, 0.12, 3.4, 0.02};
  return of_16_bits({1.1, 0.0, 0.25, 1.4, 0.01}, dtype);
}

// Of m tokens, judged by the first ones and by the rows of `most` that they have active.
bool dense_wins(const Costs& costs, int64_t m, int64_t tokens, const ActiveRow* rows,
                int64_t row_count, int64_t most) {
  if (tokens == 1) return false;
  int64_t products = 0;
  for (int64_t i = 0; i < row_count; ++i) products += std::popcount(rows[i].tokens);
  const auto share = [&](int64_t count) {
    return static_cast<double>(count) / static_cast<double>(std::max<int64_t>(most, 1));
  };
  const double tile = costs.row * share(row_count) + costs.token * static_cast<double>(tokens) +
                      costs.product * share(products);
  const double tiles = static_cast<double>(m) / static_cast<double>(tokens);
  return tile * tiles > costs.dense + costs.dense_token * static_cast<double>(m);
}

// One row more than there can be: those who look for active ones write before they count.
ActiveRow* rows_for(int64_t most) {
  return static_cast<ActiveRow*>(active_rows.at_least((most + 1) * int64_t{sizeof(ActiveRow)}));
}

bool linear_tile(const LinearArgs& args, const Unit& unit, int64_t first, int64_t count) {
  const int64_t size = size_of(args.dtype);
  const auto at = [&](const void* p, int64_t element) {
    return static_cast<const char*>(p) + element * size;
  };
  const Tokens x = {at(args.x, first * args.x_stride), args.x_stride, count, args.threshold};
  ActiveRow* rows = rows_for(args.k);
  const int64_t row_count = find_active(unit, x, args.k, args.threads, rows);
  const Costs costs = linear_costs(args.dtype);
  if (first == 0 && dense_wins(costs, args.m, count, rows, row_count, args.k)) return false;
  const double work = static_cast<double>(row_count * args.n * count);
  parallel_ranges(
      threads_for_work(args.threads, work), ceil_div(args.n, kBlockN),
      [&](int64_t begin, int64_t end) {
        const int64_t column = begin * kBlockN;
        const int64_t columns = std::min(end * kBlockN, args.n) - column;
        auto* out = static_cast<char*>(args.out) + (first * args.n + column) * size;
        unit.linear({at(args.weight, column),
                     args.weight_stride,
                     x,
                     rows,
                     row_count,
                     columns,
                     static_cast<float*>(sums.at_least(unit.sums_bytes(count, columns))),
                     {args.bias == nullptr ? nullptr : at(args.bias, column), args.activation, out,
                      args.n, columns}});
      });
  return true;
}

bool outputs_tile(const OutputsArgs& args, const Unit& unit, int64_t first, int64_t count) {
  const int64_t size = size_of(args.dtype);
  ActiveRow* rows = rows_for(args.n);
  const int64_t row_count = find_wanted(args.wanted + first * args.n, count, args.n, rows);
  const Costs costs = outputs_costs(args.dtype);
  if (first == 0 && dense_wins(costs, args.m, count, rows, row_count, args.n)) return false;
  auto* out = static_cast<char*>(args.out) + first * args.n * size;
  std::memset(out, 0, count * args.n * size);
  auto* x = static_cast<float*>(sums.at_least(count * args.k * int64_t{sizeof(float)}));
  unit.to_floats(
      {static_cast<const char*>(args.x) + first * args.x_stride * size, args.x_stride, count, 0},
      args.k, x);
  const double work = static_cast<double>(row_count * args.k * count);
  parallel_ranges(threads_for_work(args.threads, work), row_count, [&](int64_t begin, int64_t end) {
    unit.outputs({args.weight,
                  args.weight_stride,
                  args.k,
                  x,
                  rows + begin,
                  end - begin,
                  {args.bias, args.activation, out, args.n, args.n}});
  });
  return true;
}

// Whether all tiles were computed: it is the first one that may refuse.
template <class Args, class Tile>
bool for_tiles(const Args& args, const Tile& tile) {
  bool computed = true;
  for (int64_t first = 0; first < args.m && computed; first += kMostTokens) {
    computed = tile(first, std::min(kMostTokens, args.m - first));
  }
  return computed;
}

}  // namespace

bool linear(const LinearArgs& args) {
  if (args.n == 0) return true;
  const Unit* unit = choose(args.dtype).unit;
  if (unit == nullptr) {
    linear_serial(args);
    return true;
  }
  return for_tiles(
      args, [&](int64_t first, int64_t count) { return linear_tile(args, *unit, first, count); });
}

bool outputs(const OutputsArgs& args) {
  if (args.n == 0) return true;
  const Unit* unit = choose(args.dtype).unit;
  if (unit == nullptr) {
    outputs_serial(args);
    return true;
  }
  return for_tiles(
      args, [&](int64_t first, int64_t count) { return outputs_tile(args, *unit, first, count); });
}

const char* kernel_target(DType dtype) {
  const Choice choice = choose(dtype);
  return name(choice.unit == nullptr ? Target::kSerial : choice.owner);
}

}  // namespace gossamer::actsparse
