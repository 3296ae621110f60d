// Cuts the products into tasks and hands them to the kernels of the target in force.
#include <algorithm>

#include "common/cache_size.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "grouped/gemm_unit.h"

namespace gossamer::grouped {
namespace {

const Unit* unit_of(Target target, DType dtype) {
#ifdef GOSSAMER_X86
  switch (target) {
    case Target::kAVX2: return unit_avx2(dtype);
    case Target::kAVX512: return unit_avx512(dtype);
    case Target::kAVX512BF16: return unit_avx512_bf16(dtype);
#ifdef GOSSAMER_AMX
    case Target::kAMXBF16: return unit_amx_bf16(dtype);
#endif
    default: break;
  }
#endif
  (void)target, (void)dtype;
  return nullptr;
}

thread_local Scratch packed_x, sums;

// Tokens of an expert that are packed at once: half of L2 holds them, and where outputs are few
// there are several tasks.
constexpr int64_t kMostRows = 512;

// Some tokens of an expert, and the blocks of its outputs.
struct Piece {
  int64_t expert, first, rows;
};

class Products {
 public:
  Products(const GroupedArgs& args, const Unit& unit) : args_(args), unit_(unit) {
    const int64_t token_bytes =
        ceil_div(args.k, unit.step_columns) * unit.step_columns * unit.column_bytes;
    most_rows_ = std::clamp<int64_t>(l2_bytes() / 2 / token_bytes, 1, kMostRows);
    most_rows_ = ceil_div(most_rows_, unit.max_tile) * unit.max_tile;
    row_bytes_ = token_bytes;
    blocks_ = ceil_div(args.n, kBlockN);
  }

  void run() const {
    int64_t total = 0;
    for_pieces([&](const Piece& piece) { total += blocks_ * cost(piece); });
    const double multiply_adds =
        static_cast<double>(total) * kBlockN * static_cast<double>(args_.k);
    // Blocks follow each other by piece, and each thread takes those that begin in its share of the
    // cost: one that has an expert's tokens packed meets as many of its weights as it can.
    parallel_run(threads_for_work(args_.threads, multiply_adds), [&](int thread, int team) {
      const int64_t begin = total / team * thread + std::min<int64_t>(total % team, thread);
      const int64_t end = begin + total / team + (thread < total % team ? 1 : 0);
      int64_t at = 0;
      for_pieces([&](const Piece& piece) {
        const int64_t each = cost(piece);
        const auto block = [&](int64_t of_cost) {
          return std::clamp<int64_t>(ceil_div(std::max<int64_t>(of_cost - at, 0), each), 0,
                                     blocks_);
        };
        run_piece(piece, block(begin), block(end));
        at += blocks_ * each;
      });
    });
  }

 private:
  int64_t cost(const Piece& piece) const { return unit_.read_tokens + piece.rows; }

  template <class Body>
  void for_pieces(const Body& body) const {
    for (int64_t e = 0; e < args_.experts; ++e) {
      const int64_t begin = args_.begin(e), tokens = args_.ends[e] - begin;
      const int64_t pieces = ceil_div(tokens, most_rows_);
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t rows = ceil_div(ceil_div(tokens, pieces), unit_.max_tile) * unit_.max_tile;
        const int64_t first = p * rows;
        if (first < tokens) body(Piece{e, begin + first, std::min(rows, tokens - first)});
      }
    }
  }

  void run_piece(const Piece& piece, int64_t first_block, int64_t last_block) const {
    if (first_block >= last_block) return;
    const int64_t size = size_of(args_.dtype), n = args_.n, k = args_.k;
    const int64_t output = first_block * kBlockN;
    const int64_t tiles = ceil_div(piece.rows, unit_.max_tile);
    const auto tile =
        static_cast<int>(unit_.whole_tiles ? unit_.max_tile : ceil_div(piece.rows, tiles));
    const int64_t padded_rows = tiles * tile;
    void* x = packed_x.at_least(padded_rows * row_bytes_);
    const auto* rows = static_cast<const char*>(args_.x) + piece.first * args_.x_stride * size;
    unit_.pack({rows, args_.x_stride, piece.rows, k}, tile, x);
    const int64_t row = piece.expert * n + output;  // of all experts' weights
    const auto* bias = static_cast<const char*>(args_.bias);
    auto* y = static_cast<char*>(args_.out) + (piece.first * n + output) * size;
    unit_.run(
        {static_cast<const char*>(args_.weights) + row * k * size,
         std::min(last_block * kBlockN, n) - output,
         k,
         x,
         tile,
         piece.rows,
         static_cast<float*>(
             sums.at_least((padded_rows * kBlockN + kSumsPast) * int64_t{sizeof(float)})),
         {bias == nullptr ? nullptr : bias + row * size, args_.activation, y, n, n - output}});
  }

  const GroupedArgs& args_;
  const Unit& unit_;
  int64_t most_rows_, row_bytes_, blocks_;
};

}  // namespace

void gemm(const GroupedArgs& args) {
  const Unit* unit = unit_of(target(), args.dtype);
  if (unit == nullptr) return gemm_serial(args);
  Products(args, *unit).run();
}

Choice choose(DType dtype) {
  const Target wanted = target();
  const Unit* unit = unit_of(wanted, dtype);
  if (unit == nullptr) {
    return {"serial", name(Target::kSerial),
            wanted == Target::kSerial ? "no vector target is in force"
                                      : "float64 has the serial kernel only"};
  }
  // A target without kernels of its own hands out those of the one before.
  Target owner = wanted;
  for (auto below = static_cast<int>(wanted) - 1; below >= 0; --below) {
    if (unit_of(static_cast<Target>(below), dtype) == unit) owner = static_cast<Target>(below);
  }
  return {unit->kernel, name(owner), unit->why};
}

}  // namespace gossamer::grouped
