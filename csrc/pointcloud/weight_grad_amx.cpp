// tiles: bfloat16 by AMX, C[channel][output] = A[channel][two pairs] B[two pairs][output].
//
//   A   16 channels of x, transposed: 32 pairs of each
//   B   16 outputs of dy:             [two pairs][output][2]
//   C   sums of 16 channels x 16 outputs over a batch of pairs, then added to those of the tap
//
// Subnormals count as zero (the instruction's definition).
#include "common/amx.h"
#include "common/simd_avx512.h"
#include "pointcloud/weight_grad_slices.h"

namespace gossamer::pointcloud {
namespace {

struct TileOuter {
  using T = BFloat16;
  using Out = Outputs<Simd, T>;
  static constexpr int kLanes = Simd::kLanes;                 // channels or outputs of a tile
  static constexpr int kStep = Tiles::kRowBytes / sizeof(T);  // pairs
  static constexpr int kSteps = 8;                            // of a batch
  static constexpr int kTiles = 4;                            // of channels, and of outputs

  static __m512i load(const T* row, int64_t count) {  // a word each, zeros past the count
    const auto mask = static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  }

  // Two pairs of each lane in a word; a row that is not there counts as zeros.
  static Simd::I couple(const T* even, const T* odd, int64_t first, int64_t count) {
    const auto row = [&](const T* from) {
      return from == nullptr ? _mm512_setzero_si512() : load(from + first, count - first);
    };
    return Simd::or_(row(even), Simd::shift_left<16>(row(odd)));
  }

  // Up to kTiles tiles of channels and of outputs.
  struct Part {
    int64_t channel, channels, output, outputs;  // in the rows of x and dy
    float* sums;
    int64_t sums_stride;
  };

  struct Batch {
    alignas(64) char a[kTiles][kSteps][Tiles::kBytes], b[kTiles][kSteps][Tiles::kBytes];
  };

  // Rows of the pairs from `first` on, 32 for each of the steps.
  template <class RowOf>
  static void pack(const RowOf& row_of, int64_t first, int64_t end, int64_t count, bool transpose,
                   char (&tiles)[kTiles][kSteps][Tiles::kBytes]) {
    for (int64_t s = 0; s * kStep < end - first; ++s) {
      const T* rows[kStep];
      for (int64_t p = 0; p < kStep; ++p) {
        const int64_t pair = first + s * kStep + p;
        rows[p] = pair < end ? row_of(pair) : nullptr;
      }
      for (int64_t t = 0; t * kLanes < count; ++t) {
        Simd::I words[kLanes];
        for (int p = 0; p < kLanes; ++p) {
          words[p] = couple(rows[2 * p], rows[2 * p + 1], t * kLanes, count);
        }
        if (transpose) {
          Simd::transpose(words, tiles[t][s], Tiles::kRowBytes);
        } else {
          for (int p = 0; p < kLanes; ++p) {
            _mm512_store_si512(tiles[t][s] + p * Tiles::kRowBytes, words[p]);
          }
        }
      }
    }
  }

  // Two tiles of channels by two of outputs; the second ones may be of no use.
  static void multiply(const Batch& batch, int64_t steps, int64_t channel, int64_t output,
                       const Part& part) {
    alignas(64) float c[2 * kLanes][2 * kLanes];
    Tiles::fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, batch.a[channel][s], Tiles::kRowBytes);
      _tile_loadd(5, batch.a[channel + 1][s], Tiles::kRowBytes);
      _tile_loadd(6, batch.b[output][s], Tiles::kRowBytes);
      _tile_loadd(7, batch.b[output + 1][s], Tiles::kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, sizeof c[0]);
    _tile_stored(1, c[0] + kLanes, sizeof c[0]);
    _tile_stored(2, c[kLanes], sizeof c[0]);
    _tile_stored(3, c[kLanes] + kLanes, sizeof c[0]);
    Tiles::fence();
    const int64_t first = channel * kLanes, last = first + 2 * kLanes;
    for (int64_t i = first; i < last && i < part.channels; ++i) {
      for (int64_t o = 0; o < 2 * kLanes && output * kLanes + o < part.outputs; o += kLanes) {
        float* sums = part.sums + i * part.sums_stride + output * kLanes + o;
        Simd::store(sums, Simd::add(Simd::load(sums), Simd::load(c[i - first] + o)));
      }
    }
  }

  static void run_part(const WeightGradArgs& args, const Slice& slice, const Part& part) {
    const KernelMap& map = args.map;
    const T* x = static_cast<const T*>(args.x) + part.channel;
    const T* dy = static_cast<const T*>(args.dy) + part.output;
    const auto x_row = [&](int64_t pair) { return x + map.in_row(map.in[pair]) * args.x_stride; };
    const auto dy_row = [&](int64_t pair) {
      return dy + map.out_row(map.out[pair]) * args.dy_stride;
    };
    for (int64_t first = slice.begin; first < slice.end; first += kSteps * kStep) {
      Batch batch;  // tiles past the last channel or output hold anything: their sums are not used
      const int64_t end = slice.end - first < kSteps * kStep ? slice.end : first + kSteps * kStep;
      pack(x_row, first, end, part.channels, true, batch.a);
      pack(dy_row, first, end, part.outputs, false, batch.b);
      const int64_t steps = (end - first + kStep - 1) / kStep;
      for (int64_t c = 0; c * kLanes < part.channels; c += 2) {
        for (int64_t o = 0; o * kLanes < part.outputs; o += 2) {
          multiply(batch, steps, c, o, part);
        }
      }
    }
  }

  static void run_slice(const WeightGradArgs& args, const Slice& slice, float* sums) {
    constexpr int64_t kBlock = kTiles * kLanes;
    const Channels& channels = args.channels;
    const int64_t c_in = channels.group_in(), c_out = channels.group_out();
    const SumsRow row = Out::sums_row(channels);
    for (int64_t g = 0; g < channels.groups; ++g) {
      for (int64_t o = 0; o < c_out; o += kBlock) {
        for (int64_t c = 0; c < c_in; c += kBlock) {
          run_part(args, slice,
                   {g * c_in + c, c_in - c < kBlock ? c_in - c : kBlock, g * c_out + o,
                    c_out - o < kBlock ? c_out - o : kBlock, sums + c * row.all + g * row.group + o,
                    row.all});
        }
      }
    }
  }
  static void run(const WeightGradTask& task) {
    const Tiles tiles;
    run_slices(task, Out::sums_row(task.args.channels), run_slice);
  }

  static constexpr WeightGradUnit unit = {.sums_row = Out::sums_row, .run = run};
};

}  // namespace

const WeightGradUnit* weight_grad_unit_amx_bf16(DType dtype, const Channels& channels) {
  const bool tiles = dtype == DType::kBFloat16 && channels.fill_tiles();
  return tiles ? &TileOuter::unit : weight_grad_unit_avx512(dtype, channels);
}

}  // namespace gossamer::pointcloud
