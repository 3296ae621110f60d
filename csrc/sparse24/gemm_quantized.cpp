// Cuts a product with 8-bit or 4-bit weights into tasks for the unit of the target in force.
//
//   few rows    tiles of x, packed, meet the weights as they are widened, word by word, or by AMX
//               tiles: all of int8
//   many rows   a chunk of the weight is expanded to float32 panels, which the float32 product of
//               2:4 weights (gemm.cpp) multiplies: float sums only
#include <array>
#include <atomic>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "sparse24/gemm_config.h"
#include "sparse24/gemm_quantized_unit.h"
#include "sparse24/portable_form.h"
#include "sparse24/quantized.h"

namespace gossamer::sparse24 {
namespace {

// Whether a scale of 4-bit weights serves whole records.
bool whole_records(const QuantizedWeight& w) {
  return w.scale_columns() == 1 || w.group % kRecordK == 0;
}

#ifdef GOSSAMER_AMX
// Rows from which on tiles are faster than vectors, measured on Emerald Rapids.
constexpr int64_t kTileRows = 9;

bool has_tiles(const QuantizedGemmArgs& args) {
  if (args.m < kTileRows) return false;
  if (!args.weight.four_bit()) return true;
  // Both factors have to be bfloat16 as they are, and a scale one of whole records.
  return args.x_dtype == DType::kBFloat16 && whole_records(args.weight);
}
#endif

const QuantizedUnit* unit_of(Target target, const QuantizedGemmArgs& args) {
  const DType dtype = args.weight.dtype;
#ifdef GOSSAMER_X86
  switch (target) {
    case Target::kSerial: break;
    case Target::kAVX2: return quantized_unit_avx2(dtype);
    case Target::kAVX512: return quantized_unit_avx512(dtype);
    case Target::kAVX512BF16: return quantized_unit_avx512_vnni(dtype);
    case Target::kAMXBF16:
#ifdef GOSSAMER_AMX
      if (has_tiles(args)) return quantized_unit_amx(dtype);
#endif
      return quantized_unit_avx512_vnni(dtype);
  }
#endif
  (void)target, (void)dtype;
  return nullptr;
}

// What a thread packs of x at once, beside which a block of the weight stays in L2; and what it
// converts at once of a portable weight.
constexpr int64_t kPackedBytes = 384 << 10, kConvertedBytes = 512 << 10;
// What all threads together expand at once, in L3; and what is kept of x between calls.
constexpr int64_t kExpandedBytes = 8 << 20, kKeptBytes = 16 << 20;

thread_local Scratch quantized_x, quantized_x_scales;
thread_local Scratch packed_x, converted_weight, scale_lines, block_scratch;
thread_local Scratch expanded_x, expanded_weight, unfinished;  // of many rows, for the whole team

const float* e4m3_numbers() {
  static const auto numbers = [] {
    std::array<float, 256> made{};
    for (int bits = 0; bits < 256; ++bits) {
      made[bits] = kE4M3Scale * to_float(E4M3{static_cast<uint8_t>(bits)});
    }
    return made;
  }();
  return numbers.data();
}

// The panels of the blocks [begin, end), converted now where the weight is portable.
const uint32_t* panels_of(const Weight& w, int64_t begin, int64_t end) {
  if (w.panels != nullptr) return w.panels + begin * w.block_words();
  auto* converted =
      static_cast<uint32_t*>(converted_weight.at_least(4 * (end - begin) * w.block_words()));
  to_panels(w, begin, end, converted);
  return converted;
}

// The scales of 4-bit weights beside a block; none for the other types.
ScaleLines lines_of(const QuantizedWeight& w, int64_t block) {
  if (!w.four_bit()) return {nullptr, w.records()};
  const int64_t columns = w.scale_columns(), of_record = w.group / kRecordK;
  const bool by_records = whole_records(w);
  const int64_t count = by_records ? columns : w.records() * kRecordGroups;
  auto* lines = static_cast<float*>(scale_lines.at_least(count * kBlockN * sizeof(float)));
  for (int lane = 0; lane < kBlockN; ++lane) {
    const int64_t row = block * kBlockN + lane;
    const float* of_row = w.scales + row * columns;
    for (int64_t line = 0; line < count; ++line) {
      const int64_t column = by_records ? line : 4 * line / w.group;
      lines[line * kBlockN + lane] = row < w.n && column < columns ? of_row[column] : 0.0f;
    }
  }
  return {lines, columns == 1 ? w.records() : by_records ? of_record : 0};
}

QuantizedEnds ends_at(const QuantizedGemmArgs& args, int64_t row, int64_t output) {
  const int64_t size = size_of(args.out_dtype), n = args.weight.n;
  const auto* bias = static_cast<const char*>(args.bias);
  return {args.x_scales == nullptr ? nullptr : args.x_scales + row,
          args.weight.four_bit() ? nullptr : args.weight.scales + output,
          args.out_dtype,
          bias == nullptr ? nullptr : bias + output * size,
          args.activation,
          static_cast<char*>(args.out) + (row * n + output) * size,
          n,
          n - output};
}

XRows rows_at(const QuantizedGemmArgs& args, int64_t row, int64_t rows) {
  const auto* x = static_cast<const char*>(args.x) + row * args.x_stride * size_of(args.x_dtype);
  return {x, args.x_stride, rows, args.weight.k};
}

// ---- few rows -----------------------------------------------------------------------------------

// The outputs of the blocks [begin, end) for the rows from `row` on. Whether they may be trusted.
bool few_rows(const QuantizedGemmArgs& args, const QuantizedUnit& unit, int tile, int64_t row,
              int64_t rows, int64_t begin, int64_t end) {
  const QuantizedWeight& w = args.weight;
  const int64_t records = ceil_div(w.records(), unit.records_together) * unit.records_together;
  const int64_t tile_bytes = tile * records * unit.record_bytes;
  const int64_t tiles = ceil_div(rows, tile);
  const int64_t tiles_at_once = std::clamp<int64_t>(kPackedBytes / tile_bytes, 1, tiles);
  const int64_t rows_at_once = tiles_at_once * tile;
  const int64_t chunk = w.panels != nullptr
                            ? end - begin
                            : std::max<int64_t>(1, kConvertedBytes / (4 * w.block_words()));
  void* packed = packed_x.at_least(tiles_at_once * tile_bytes);
  void* expanded = block_scratch.at_least(records * unit.scratch_bytes);
  int64_t in_packed = -1;
  bool trusted = true;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t last = std::min(first + chunk, end);
    const uint32_t* panels = panels_of(w, first, last);
    for (int64_t at = 0; at < rows; at += rows_at_once) {
      const int64_t count = std::min(rows_at_once, rows - at);
      if (in_packed != at) {
        unit.pack(rows_at(args, row + at, count), args.x_dtype, e4m3_numbers(), tile, packed);
        in_packed = at;
      }
      for (int64_t block = first; block < last; ++block) {
        trusted &=
            unit.run({panels + (block - first) * w.block_words(), w.records(), lines_of(w, block),
                      packed, expanded, tile, count, ends_at(args, row + at, block * kBlockN)});
      }
    }
  }
  return trusted;
}

bool few_rows_by_team(const QuantizedGemmArgs& args, const QuantizedUnit& unit, int team) {
  const int64_t tiles = ceil_div(args.m, unit.max_rows);
  const int tile = unit.tile_for(ceil_div(args.m, tiles));
  const int64_t blocks = ceil_div(args.weight.n, kBlockN);
  // Rows are shared out as well where there are fewer blocks than threads.
  const int64_t parts = std::clamp<int64_t>(team / blocks, 1, ceil_div(args.m, tile));
  const int64_t rows = ceil_div(ceil_div(args.m, tile), parts) * tile;
  std::atomic<bool> trusted = true;
  parallel_ranges(team, blocks * parts, [&](int64_t begin, int64_t end) {
    while (begin < end && trusted) {
      const int64_t row = begin / blocks * rows, block = begin % blocks;
      const int64_t last = std::min(blocks, block + end - begin);
      begin += last - block;
      if (row >= args.m) break;
      const int64_t count = std::min(rows, args.m - row);
      if (!few_rows(args, unit, tile, row, count, block, last)) trusted = false;
    }
  });
  return trusted;
}

// The product of some of its rows.
QuantizedGemmArgs rows_of(const QuantizedGemmArgs& args, int64_t row, int64_t rows) {
  QuantizedGemmArgs part = args;
  part.m = rows;
  part.x = rows_at(args, row, rows).data;
  part.x_scales = args.x_scales == nullptr ? nullptr : args.x_scales + row;
  part.out = ends_at(args, row, 0).out;
  return part;
}

// ---- many rows ----------------------------------------------------------------------------------

// How many are expanded at once.
int64_t expanded_blocks(const QuantizedWeight& w) {
  const Weight expanded{DType::kFloat32, w.n, w.k, nullptr, nullptr, nullptr};
  return std::clamp<int64_t>(kExpandedBytes / (4 * expanded.block_words()), 1, expanded.blocks());
}

void many_rows(const QuantizedGemmArgs& args, const QuantizedUnit& unit, int team) {
  const QuantizedWeight& w = args.weight;
  Weight expanded{DType::kFloat32, 0, w.k, nullptr, nullptr, nullptr};
  const int64_t chunk = expanded_blocks(w);
  const int64_t k = w.records() * kRecordK;
  auto* x = static_cast<float*>(expanded_x.at_least(args.m * k * sizeof(float)));
  auto* sums = static_cast<float*>(unfinished.at_least(args.m * chunk * kBlockN * sizeof(float)));
  auto* panels = static_cast<uint32_t*>(
      expanded_weight.at_least(chunk * expanded.block_words() * sizeof(uint32_t)));
  parallel_ranges(team, args.m, [&](int64_t begin, int64_t end) {
    // Tiles of one row are x itself, in float32.
    unit.pack(rows_at(args, begin, end - begin), args.x_dtype, e4m3_numbers(), 1, x + begin * k);
  });
  expanded.k = k;
  expanded.panels = panels;
  for (int64_t first = 0; first < w.blocks(); first += chunk) {
    const int64_t blocks = std::min(chunk, w.blocks() - first);
    parallel_ranges(team, blocks, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        unit.expand(panels_of(w, first + block, first + block + 1), w.records(),
                    lines_of(w, first + block), panels + block * expanded.block_words());
      }
    });
    expanded.n = blocks * kBlockN;
    gemm({expanded, args.m, x, k, nullptr, Activation::kNone, sums, args.threads});
    parallel_ranges(team, args.m, [&](int64_t begin, int64_t end) {
      const QuantizedEnds ends = ends_at(args, begin, first * kBlockN);
      unit.finish(ends, sums + begin * expanded.n, expanded.n, end - begin,
                  std::min(expanded.n, ends.n));
    });
  }
  for (Scratch* scratch : {&expanded_x, &expanded_weight, &unfinished}) {
    scratch->release_above(kKeptBytes);
  }
}

// The serial kernel reads the portable form only.
void serial_any(const QuantizedGemmArgs& args) {
  if (args.weight.panels == nullptr) return gemm_quantized_serial(args);
  const PortableForm form(args.weight);
  QuantizedGemmArgs portable = args;
  form.give_to(portable.weight);
  gemm_quantized_serial(portable);
}

// The same product of an x of 8 bits, which lies in quantized_x.
QuantizedGemmArgs with_quantized_x(const QuantizedGemmArgs& args) {
  const int64_t k = args.weight.k;
  auto* scales = static_cast<float*>(quantized_x_scales.at_least(args.m * sizeof(float)));
  void* numbers = quantized_x.at_least(args.m * k);
  quantize_rows({args.m, k, args.x_dtype, args.x, args.x_stride, args.weight.dtype, numbers, scales,
                 args.threads});
  QuantizedGemmArgs quantized = args;
  quantized.x_dtype = args.weight.dtype;
  quantized.x = numbers;
  quantized.x_stride = k;
  quantized.x_scales = scales;
  return quantized;
}

bool gemm_by(Target target, const QuantizedGemmArgs& args) {
  const QuantizedWeight& w = args.weight;
  const QuantizedUnit* unit = unit_of(target, args);
  if (unit == nullptr || (w.dtype == DType::kInt8 && w.k > kMaxInt8Columns)) {
    serial_any(args);
    return true;
  }
  const double work = static_cast<double>(args.m) * w.n * (w.k / 2);
  const int team = threads_for_work(args.threads, work);
  if (unit->expand == nullptr || args.m <= few_rows_limit(target, DType::kFloat32, intel_cores())) {
    return few_rows_by_team(args, *unit, team);
  }
  // x and the sums of so many rows are floats in memory.
  const int64_t floats = std::max(w.records() * kRecordK, expanded_blocks(w) * kBlockN);
  const int64_t rows = std::max<int64_t>(256, kKeptBytes / (4 * floats));
  for (int64_t row = 0; row < args.m; row += rows) {
    many_rows(rows_of(args, row, std::min(rows, args.m - row)), *unit, team);
  }
  return true;
}

}  // namespace

void gemm_quantized(const QuantizedGemmArgs& args) {
  const QuantizedWeight& w = args.weight;
  if (args.m == 0 || w.n == 0) return;
  if (!w.four_bit() && args.x_scales == nullptr) {
    gemm_quantized(with_quantized_x(args));
    quantized_x.release_above(kKeptBytes);
    return;
  }
  const Target target = gossamer::target();  // once: another thread may force a different one
  if (!gemm_by(target, args)) gemm_by(static_cast<Target>(static_cast<int>(target) - 1), args);
}

}  // namespace gossamer::sparse24
