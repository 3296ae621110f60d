// Cuts a GEMM into tasks and hands them to the kernels of the target in force.
#include <atomic>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/target.h"
#include "sparse24/gemm_config.h"
#include "sparse24/gemm_unit.h"
#include "sparse24/portable_form.h"

namespace gossamer::sparse24 {
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

thread_local Scratch packed_x, many_rows_scratch, packed_weight;

Epilogue epilogue_at(const GemmArgs& args, int64_t row, int64_t output) {
  const int64_t size = size_of(args.weight.dtype), n = args.weight.n;
  const auto* bias = static_cast<const char*>(args.bias);
  return {bias == nullptr ? nullptr : bias + output * size, args.activation,
          static_cast<char*>(args.out) + (row * n + output) * size, n, n - output};
}

XRows rows_at(const GemmArgs& args, int64_t row, int64_t rows) {
  const auto* x = static_cast<const char*>(args.x);
  return {x + row * args.x_stride * size_of(args.weight.dtype), args.x_stride, rows, args.weight.k};
}

// Of a weight that comes in its portable form, what is converted at once: by each thread of
// few_rows for itself (it stays in L2), by the team of many_rows together (it stays in L3).
constexpr int64_t kConvertedBytes = 512 << 10, kConvertedTogetherBytes = 8 << 20;

// What a thread of few_rows keeps of x: 28 rows of 150 000 float32. Wider layers are rare.
constexpr int64_t kKeptBytes = 16 << 20;

int64_t blocks_within(const Weight& w, int64_t bytes) {
  if (w.panels != nullptr) return w.blocks();
  return std::clamp<int64_t>(bytes / (4 * w.block_words()), 1, w.blocks());
}

void gemm_few_rows(const GemmArgs& args, const Unit& unit, const GemmConfig& config) {
  const Weight& w = args.weight;
  const int64_t row_bytes = w.records() * kRecordK * unit.few_rows_element_bytes;
  const bool in_place =
      args.m == 1 && w.k % kRecordK == 0 && unit.few_rows_element_bytes == size_of(w.dtype);
  const int64_t chunk = blocks_within(w, kConvertedBytes);
  parallel_ranges(config.threads, w.blocks(), [&](int64_t begin, int64_t end) {
    const void* x = args.x;
    if (!in_place) {
      // By each thread for itself: lines that another core has just written cost it more to fetch
      // than to write anew (16 rows of 384 columns: 10 us against 1 on Emerald Rapids).
      void* packed = packed_x.at_least(config.tiles * config.tile * row_bytes);
      unit.pack_few(rows_at(args, 0, args.m), config.tile, packed);
      x = packed;
    }
    for (int64_t block = begin; block < end; block += chunk) {
      const int64_t blocks = std::min(chunk, end - block);
      const uint32_t* panels = w.panels;
      if (panels != nullptr) {
        panels += block * w.block_words();
      } else {
        auto* converted =
            static_cast<uint32_t*>(packed_weight.at_least(4 * chunk * w.block_words()));
        to_panels(w, block, block + blocks, converted);
        panels = converted;
      }
      unit.few_rows({panels, blocks, w.records(), x, config.tile, args.m,
                     epilogue_at(args, 0, block * kBlockN)});
    }
    packed_x.release_above(kKeptBytes);
  });
}

// The outputs of `all_blocks` blocks from `first_block` on; `panels` are theirs.
// Whether the result may be trusted.
bool gemm_many_rows(const GemmArgs& args, const Unit& unit, const GemmConfig& config, int lanes,
                    const uint32_t* panels, int64_t first_block, int64_t all_blocks) {
  const Weight& w = args.weight;
  const int64_t tile_rows = static_cast<int64_t>(config.tile) * lanes;
  const int64_t panel_words = config.records_per_pass * unit.panel_rows * tile_rows;
  const int64_t weight_words = config.records_per_pass * unit.weight_words;
  // The epilogue reads, and ignores, up to a block past the last one.
  const int64_t sum_words = (config.blocks_per_task + 1) * kBlockN * tile_rows;
  const int64_t tasks = ceil_div(all_blocks, config.blocks_per_task) * config.tiles;
  // The team goes through the weight together, chunk by chunk, each thread with tiles of its own:
  // what one of them reads from memory the others find in the shared cache.
  std::atomic<bool> trusted = true;
  const auto run_tasks = [&](int thread, int team) {
    auto* scratch = static_cast<uint32_t*>(
        many_rows_scratch.at_least(4 * (panel_words + weight_words + sum_words)));
    for (int64_t task = thread; task < tasks && trusted; task += team) {
      const int64_t block = task / config.tiles * config.blocks_per_task;
      const int64_t row = task % config.tiles * tile_rows;
      const int64_t rows = std::min(tile_rows, args.m - row);
      const bool good = unit.many_rows(
          {panels + block * w.block_words(), std::min(config.blocks_per_task, all_blocks - block),
           w.records(), config.records_per_pass, config.spread_fetch, rows_at(args, row, rows),
           static_cast<int>(ceil_div(rows, lanes)), scratch, scratch + panel_words,
           reinterpret_cast<float*>(scratch + panel_words + weight_words),
           epilogue_at(args, row, (first_block + block) * kBlockN)});
      if (!good) trusted = false;
    }
  };
  parallel_run(static_cast<int>(std::min<int64_t>(config.threads, tasks)), run_tasks);
  return trusted;
}

// The serial kernel reads the portable form only.
void gemm_serial_any(const GemmArgs& args) {
  if (args.weight.panels == nullptr) return gemm_serial(args);
  const PortableForm form(args.weight);
  GemmArgs portable = args;
  form.give_to(portable.weight);
  gemm_serial(portable);
}

bool gemm_by(Target target, const GemmArgs& args) {
  const Weight& w = args.weight;
  const bool intel = intel_cores();
  const GemmConfig config =
      choose_gemm_config(args.m, w.n, w.k, w.dtype, target, intel, args.threads);
  const Unit* unit = config.kernel == Kernel::kSerial ? nullptr : unit_of(target, w.dtype);
  if (unit == nullptr) {
    gemm_serial_any(args);
    return true;
  }
  if (config.kernel == Kernel::kFewRows) {
    gemm_few_rows(args, *unit, config);
    return true;
  }
  const int lanes = traits(target).lanes;
  if (w.panels != nullptr) {
    return gemm_many_rows(args, *unit, config, lanes, w.panels, 0, w.blocks());
  }
  const int64_t chunk = blocks_within(w, kConvertedTogetherBytes);
  bool trusted = true;
  for (int64_t first = 0; first < w.blocks() && trusted; first += chunk) {
    const int64_t blocks = std::min(chunk, w.blocks() - first);
    auto* panels = static_cast<uint32_t*>(packed_weight.at_least(4 * chunk * w.block_words()));
    parallel_ranges(config.threads, blocks, [&](int64_t begin, int64_t end) {
      to_panels(w, first + begin, first + end, panels + begin * w.block_words());
    });
    const GemmConfig of_chunk =
        many_rows_config(args.m, blocks * kBlockN, w.k, w.dtype, target, intel, config.threads);
    trusted = gemm_many_rows(args, *unit, of_chunk, lanes, panels, first, blocks);
  }
  return trusted;
}

}  // namespace

void gemm(const GemmArgs& args) {
  if (args.m == 0 || args.weight.n == 0) return;
  const Target target = gossamer::target();  // once: another thread may force a different one
  if (!gemm_by(target, args)) gemm_by(static_cast<Target>(static_cast<int>(target) - 1), args);
}

}  // namespace gossamer::sparse24
