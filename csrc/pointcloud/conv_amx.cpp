// tiles: bfloat16 by AMX, C[pair][output] = A[pair][two channels] B[two channels][output].
//
//   A   16 pairs, gathered: 32 channels of their rows
//   B   16 outputs, packed: [output tile][step of 32 channels][two of them][output][2]
//   C   sums of 16 pairs x 16 outputs, which are then added to those of the output voxels
//
// Subnormals count as zero (the instruction's definition).
#include "common/amx.h"
#include "common/simd_avx512.h"
#include "pointcloud/conv_outputs.h"

namespace gossamer::pointcloud {
namespace {

struct TileConv {
  using T = BFloat16;
  using F = Simd::F;
  using Out = Outputs<Simd, T>;
  static constexpr int kPairs = Tiles::kRows, kOutputs = 16;
  static constexpr int kStep = Tiles::kRowBytes / sizeof(T);  // channels
  static constexpr int kBlock = 4 * kStep;                    // channels of a gathered row
  static constexpr int kTogether = 4;                         // tiles of C
  // Pairs gathered, then multiplied, then added to the sums: tiles wait for what was stored just
  // before, so a few groups of pairs lie between.
  static constexpr int kBatch = 4 * kPairs;

  static int64_t steps_of(int64_t channels) { return (channels + kStep - 1) / kStep; }

  static int64_t tap_floats(const Channels& channels) {
    const int64_t tiles = Out::sums_row(channels).all / kOutputs * steps_of(channels.group_in());
    return tiles * Tiles::kBytes / int64_t{sizeof(float)};
  }

  static void pack(const ConvArgs& args, int64_t tap, float* packed) {
    const Channels& channels = args.channels;
    const int64_t c_in = channels.group_in(), c_out = channels.group_out();
    const T* weights = static_cast<const T*>(args.weights) + tap * c_in * channels.out;
    T* to = reinterpret_cast<T*>(packed);
    for (int64_t g = 0; g < channels.groups; ++g, weights += c_out) {
      for (int64_t first = 0; first < c_out; first += kOutputs) {
        for (int64_t c = 0; c < steps_of(c_in) * kStep; c += 2) {
          for (int64_t o = first; o < first + kOutputs; ++o) {
            for (int64_t i = c; i < c + 2; ++i) {
              *to++ = o < c_out && i < c_in ? weights[i * channels.out + o] : T{0};
            }
          }
        }
      }
    }
  }

  // A block of channels of a slice, against some tiles of outputs.
  struct Part {
    const char* b;
    int64_t b_tile;  // bytes from an output tile to the next
    float* sums;
    int64_t sums_stride;
    int64_t channel, count;
  };

  static void gather(const T* x, int64_t count, T* to) {
    for (int64_t c = 0; c < count; c += kStep) {
      const int64_t rest = count - c < kStep ? count - c : kStep;
      const auto mask = static_cast<__mmask32>(~uint64_t{0} >> (64 - rest));
      _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(mask, x + c));
    }
  }

  template <int Outputs>
  static void multiply(const T* a, int64_t a_row, const char* b, int64_t b_tile, int64_t steps,
                       float* c) {
    constexpr int kRowBytes = kTogether * kOutputs * sizeof(float);
    Tiles::fence();
    _tile_zero(0);
    if constexpr (Outputs > 1) _tile_zero(1);
    if constexpr (Outputs > 2) _tile_zero(2);
    if constexpr (Outputs > 3) _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s, a += kStep, b += Tiles::kBytes) {
      _tile_loadd(4, a, a_row);
      _tile_loadd(5, b, Tiles::kRowBytes);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (Outputs > 1) {
        _tile_loadd(6, b + b_tile, Tiles::kRowBytes);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (Outputs > 2) {
        _tile_loadd(7, b + 2 * b_tile, Tiles::kRowBytes);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (Outputs > 3) {
        _tile_loadd(5, b + 3 * b_tile, Tiles::kRowBytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, c, kRowBytes);
    if constexpr (Outputs > 1) _tile_stored(1, c + kOutputs, kRowBytes);
    if constexpr (Outputs > 2) _tile_stored(2, c + 2 * kOutputs, kRowBytes);
    if constexpr (Outputs > 3) _tile_stored(3, c + 3 * kOutputs, kRowBytes);
    Tiles::fence();
  }

  template <int Outputs>
  static void run_part(const ConvTask& task, const Slice& slice, const Part& part) {
    const Rows<T> x(task.args, part.channel);
    const int32_t* const out = task.args.map.out;
    const int64_t steps = steps_of(part.count), row = steps * kStep;
    for (int64_t first = slice.begin; first < slice.end; first += kBatch) {
      // Rows past the last pair keep what they had: their sums are not used.
      alignas(64) T rows[kBatch * kBlock];
      alignas(64) float c[kBatch * kTogether * kOutputs];
      const int64_t pairs = slice.end - first < kBatch ? slice.end - first : kBatch;
      for (int64_t p = first + kBatch; p < first + kBatch + pairs && p < slice.end; ++p) {
        x.fetch(p, part.count);
      }
      for (int64_t p = 0; p < pairs; ++p) gather(x.of(first + p), part.count, rows + p * row);
      for (int64_t p = 0; p < pairs; p += kPairs) {
        multiply<Outputs>(rows + p * row, row * sizeof(T), part.b, part.b_tile, steps,
                          c + p * kTogether * kOutputs);
      }
      for (int64_t p = 0; p < pairs; ++p) {
        float* sums = part.sums + (out[first + p] - slice.first) * part.sums_stride;
#pragma GCC unroll 4
        for (int o = 0; o < Outputs * kOutputs; o += kOutputs) {
          const F products = Simd::load(c + p * kTogether * kOutputs + o);
          Simd::store(sums + o, Simd::add(Simd::load(sums + o), products));
        }
      }
    }
  }
  template <int Outputs>
  static void run_part_of(int64_t outputs, const ConvTask& task, const Slice& slice,
                          const Part& part) {
    if (outputs >= Outputs) return run_part<Outputs>(task, slice, part);
    if constexpr (Outputs > 1) run_part_of<Outputs - 1>(outputs, task, slice, part);
  }

  static void run(const ConvTask& task) {
    const Tiles tiles;
    const Channels& channels = task.args.channels;
    const int64_t c_in = channels.group_in(), floats = tap_floats(channels);
    const int64_t outputs = Out::whole(channels.group_out());  // tiles of them
    const int64_t b_tile = steps_of(c_in) * Tiles::kBytes;
    const SumsRow row = Out::sums_row(channels);
    Out::run(task, row, [&](const Slice& slice) {
      const char* b = reinterpret_cast<const char*>(task.weights + slice.tap * floats);
      for (int64_t g = 0; g < channels.groups; ++g) {
        for (int64_t o = 0; o < outputs; o += kTogether) {
          for (int64_t c = 0; c < c_in; c += kBlock) {
            const Part part = {b + (g * outputs + o) * b_tile + c / kStep * Tiles::kBytes,
                               b_tile,
                               task.sums + g * row.group + o * kOutputs,
                               row.all,
                               g * c_in + c,
                               c_in - c < kBlock ? c_in - c : kBlock};
            run_part_of<kTogether>(outputs - o, task, slice, part);
          }
        }
      }
    });
  }

  static constexpr ConvUnit unit = {
      .kernel = "tiles",
      .why = "16 pairs times 16 outputs an instruction",
      .sums_row = Out::sums_row,
      .tap_floats = tap_floats,
      .pack = pack,
      .run = run,
  };
};

}  // namespace

const ConvUnit* conv_unit_amx_bf16(DType dtype, const Channels& channels) {
  // On the cores that have AMX, VDPBF16PS is slower than float32 products anywhere.
  const bool tiles = dtype == DType::kBFloat16 && channels.fill_tiles();
  return tiles ? &TileConv::unit : conv_unit_avx512(dtype, channels);
}

}  // namespace gossamer::pointcloud
