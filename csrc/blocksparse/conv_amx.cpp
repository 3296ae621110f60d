// Convolution by AMX: y[q, n] = act(sum over live tiles of x[q + shift, 16 or 32 channels] *
// W[those channels, n] + b[n]), 16 pixels and 16 outputs a tile.
//
//   A    16 pixels of a slab of the panel, side by side    from L1 or L2
//   B    the weights of a live tile, two channels of an output in a 32-bit word
//   C += A B    float32; three tiles of pixels, a group, share a tile of weights
//
// A product takes 20 cycles with 32 channels as well as with 16. In that time the core does all the
// rest, a little of it after each tile of weights:
//
//   the sums before these leave their registers (there are two sets), and get their bias and
//   activation, two tiles of outputs, a line of y, at a time;
//   the pixels of the next group are packed, and those of the one after it fetched.
//
// A NaN may be of the kernel's own making: zeros between the blocks of a tile make 0 * inf. Then
// the vector kernels compute it all.
#include "blocksparse/conv_amx_panel.h"
#include "blocksparse/conv_amx_sums.h"
#include "common/amx.h"

namespace gossamer::blocksparse {
namespace {

// Tile registers: two sets of three for sums, one of pixels, one of weights.
constexpr int kPixelTile = 6, kWeightTile = 7;

// gcc's intrinsics take the text of a register's number.
template <int Tile>
void zero_tile() {
  if constexpr (Tile == 0) _tile_zero(0);
  if constexpr (Tile == 1) _tile_zero(1);
  if constexpr (Tile == 2) _tile_zero(2);
  if constexpr (Tile == 3) _tile_zero(3);
  if constexpr (Tile == 4) _tile_zero(4);
  if constexpr (Tile == 5) _tile_zero(5);
}
template <int Tile>
void add_product() {
  if constexpr (Tile == 0) _tile_dpbf16ps(0, 6, 7);
  if constexpr (Tile == 1) _tile_dpbf16ps(1, 6, 7);
  if constexpr (Tile == 2) _tile_dpbf16ps(2, 6, 7);
  if constexpr (Tile == 3) _tile_dpbf16ps(3, 6, 7);
  if constexpr (Tile == 4) _tile_dpbf16ps(4, 6, 7);
  if constexpr (Tile == 5) _tile_dpbf16ps(5, 6, 7);
}
template <int Tile>
void store_tile(float* sums) {
  if constexpr (Tile == 0) _tile_stored(0, sums, Tiles::kRowBytes);
  if constexpr (Tile == 1) _tile_stored(1, sums, Tiles::kRowBytes);
  if constexpr (Tile == 2) _tile_stored(2, sums, Tiles::kRowBytes);
  if constexpr (Tile == 3) _tile_stored(3, sums, Tiles::kRowBytes);
  if constexpr (Tile == 4) _tile_stored(4, sums, Tiles::kRowBytes);
  if constexpr (Tile == 5) _tile_stored(5, sums, Tiles::kRowBytes);
}

// What is done a little at a time beside the products.
struct Meanwhile {
  Outgoing* before;
  Packer& packer;
  Fetch fetch;
  int64_t lots, steps, lines;  // for each tile of weights
  float* sums = nullptr;       // where those of the other set of registers go
  int stored = 0;              // how many they are

  void go_on(int64_t tiles) {
    before->some(tiles * lots);
    packer.some(tiles * steps);
    fetch.some(tiles * lines);
  }
};

struct Strides {
  int64_t pixels;   // elements of the panel
  int64_t weights;  // bytes, between two pairs of channels
};

// The products of a tile of outputs, into one of the sets of registers. `Parts` sums of each tile
// of pixels: with a single one of a single tile, the products wait for each other (52 cycles).
template <int Set, int Count, int Parts>
struct Products {
  static_assert(Count * Parts <= kMostTiles);
  static constexpr int kFirst = Set * kMostTiles, kOther = (1 - Set) * kMostTiles;

  template <int Tile>
  static void add(const uint16_t* x, int64_t pixel_stride, Meanwhile* storing) {
    if constexpr (Tile < Count * Parts) {
      _tile_loadd(6, x + Tile % Count * kTile * pixel_stride, 2 * pixel_stride);
      add_product<kFirst + Tile>();
    }
    if (storing != nullptr && Tile < storing->stored) {
      store_tile<kOther + Tile>(storing->sums + Tile * kTileFloats);
    }
  }
  // `Part` of Parts; with them the sums of the other set leave their registers.
  template <int Part>
  static void add_part(const RowTile& row, int64_t i, const uint16_t* x, const Strides& strides,
                       Meanwhile* storing) {
    _tile_loadd(7, row.weights + row.tiles[i].weights, strides.weights);
    x += row.tiles[i].x;
    if constexpr (Parts > 1) return add<Part>(x, strides.pixels, storing);
    add<0>(x, strides.pixels, storing);
    add<1>(x, strides.pixels, storing);
    add<2>(x, strides.pixels, storing);
  }

  // `x` is where the panel has the first pixel.
  static void run(const RowTile& row, const uint16_t* x, const Strides& strides, float* sums,
                  Meanwhile& meanwhile) {
    Tiles::fence();
    zero_tile<kFirst>();
    zero_tile<kFirst + 1>();
    zero_tile<kFirst + 2>();
    int64_t i = 0;
    if (row.count >= Parts) {
      add_parts(row, i, x, strides, &meanwhile);
      i = Parts;
    } else {
      store_others(meanwhile);
    }
    for (; i + Parts <= row.count; i += Parts) {
      Tiles::fence();
      meanwhile.go_on(Parts);
      Tiles::fence();
      add_parts(row, i, x, strides, nullptr);
    }
    for (; i < row.count; ++i) add_part<0>(row, i, x, strides, nullptr);
    Tiles::fence();
    meanwhile.go_on(Parts);
    meanwhile.sums = sums;
    meanwhile.stored = Count * Parts;
  }

  static void store_others(Meanwhile& meanwhile) {
    Tiles::fence();
    if (meanwhile.stored > 0) store_tile<kOther>(meanwhile.sums);
    if (meanwhile.stored > 1) store_tile<kOther + 1>(meanwhile.sums + kTileFloats);
    if (meanwhile.stored > 2) store_tile<kOther + 2>(meanwhile.sums + 2 * kTileFloats);
    Tiles::fence();
  }

 private:
  static void add_parts(const RowTile& row, int64_t i, const uint16_t* x, const Strides& strides,
                        Meanwhile* storing) {
    add_part<0>(row, i, x, strides, storing);
    if constexpr (Parts > 1) add_part<1>(row, i + 1, x, strides, storing);
    if constexpr (Parts > 2) add_part<2>(row, i + 2, x, strides, storing);
  }
};

using Run = void (*)(const RowTile&, const uint16_t*, const Strides&, float*, Meanwhile&);
constexpr Run kRun[2][kMostTiles] = {
    {Products<0, 1, 1>::run, Products<0, 2, 1>::run, Products<0, 3, 1>::run},
    {Products<1, 1, 1>::run, Products<1, 2, 1>::run, Products<1, 3, 1>::run}};
constexpr Run kRunSplit[2] = {Products<0, 1, 3>::run, Products<1, 1, 3>::run};

// Of one or two tiles of outputs, which follow each other.
void expect(const TileTask& task, const RowTile* row_tile, int tiles, const Pixels& pixels,
            Outgoing& to) {
  const int64_t first = row_tile->first;
  to.e = task.epilogue;
  to.e.n = row_tile[tiles - 1].first + row_tile[tiles - 1].outputs - first;
  to.e.out = static_cast<uint16_t*>(to.e.out) + first * task.channel_stride;
  if (to.e.bias != nullptr) to.e.bias = static_cast<const uint16_t*>(to.e.bias) + first;
  Finish<Simd, BFloat16>::load_bias(to.e, 0, to.bias);
  to.channels_last = task.shape->channels_last;
  to.channel_stride = task.channel_stride;
  to.outputs = to.e.n;
  to.tiles = tiles;
  to.parts = task.split_sums ? kMostTiles : 1;
  to.pixels = &pixels;
  to.done = 0;
  to.count = pixels.count;
}

}  // namespace

void interleave_amx(uint16_t* squares, int64_t count) {
  for (; count > 0; --count, squares += kTile * kMostDepth) {
    I rows[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      rows[i] = Simd::load_words(reinterpret_cast<const uint32_t*>(squares + i * kMostDepth));
    }
    Simd::transpose(rows, squares, Tiles::kRowBytes);
  }
}

bool multiply_tiles_amx(const TileTask& task) {
  SlabPanel& panel = *task.panel;
  const Strides strides{panel.pixel_stride, task.weight_stride};
  const Tiles tiles(kPixelTile, kWeightTile, 2 * panel.depth);
  Outgoing sums[2];
  Pixels pixels[3];
  Packer packer(task);
  Outgoing *before = &sums[0], *now = &sums[1];
  Meanwhile meanwhile{before, packer, {}, 0, 0, 0};
  int64_t all_products = 1;
  for (int64_t i = 0; i < task.count; ++i) all_products += task.row_tiles[i].count;
  // Columns past the strip's after its last output need no sums.
  const int64_t line = panel.images * panel.pitch, overhang = panel.pitch - task.strip.width;
  const int64_t all = task.strip.rows * line - overhang;
  const int64_t reach = (panel.rows - task.strip.rows) * line + overhang;
  const int64_t all_tiles = (all + kTile - 1) / kTile;
  const int64_t groups = (all_tiles + kMostTiles - 1) / kMostTiles;
  const auto end_of = [&](int64_t group) {
    const int64_t tile = (group + 1) * all_tiles / groups;
    return tile * kTile < all ? tile * kTile : all;
  };
  pixels[0].find(task, 0, end_of(0));
  packer.start(end_of(0) + reach);
  packer.rest();
  int set = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * all_tiles / groups, last = (group + 1) * all_tiles / groups;
    const int64_t begin = first * kTile, next = group + 1 < groups ? end_of(group + 1) + reach : 0;
    packer.start(next);
    meanwhile.steps = (packer.steps() + all_products - 1) / all_products;
    const Pixels& outputs = pixels[group % 3];
    if (group + 1 < groups) {
      Pixels& then = pixels[(group + 1) % 3];
      then.find(task, last * kTile, end_of(group + 1));
      meanwhile.fetch.expect(task, then);
      meanwhile.lines = meanwhile.fetch.lines(all_products);
    }
    for (int64_t i = 0; i < task.count;) {
      const RowTile* row_tile = task.row_tiles + i;
      const bool two = i + 1 < task.count && row_tile[1].first == row_tile[0].first + kTile;
      const int row_tiles = two ? 2 : 1;
      const int64_t products = row_tile[0].count + (two ? row_tile[1].count : 0) + 1;
      meanwhile.before = before;
      const int64_t at_once = products * Pixels::kAtOnce;
      meanwhile.lots = (before->left() + at_once - 1) / at_once;
      for (int t = 0; t < row_tiles; ++t, set = 1 - set) {
        const Run run = task.split_sums ? kRunSplit[set] : kRun[set][last - first - 1];
        run(row_tile[t], panel.data + begin * panel.pixel_stride, strides, now->sums[t], meanwhile);
      }
      before->rest();
      expect(task, row_tile, row_tiles, outputs, *now);
      Outgoing* const written = before;
      before = now, now = written;
      i += row_tiles;
    }
    packer.rest();
  }
  set == 0 ? Products<0, 1, 1>::store_others(meanwhile)
           : Products<1, 1, 1>::store_others(meanwhile);
  before->rest();
  return (sums[0].ordered & sums[1].ordered) == 0xffff;
}

}  // namespace gossamer::blocksparse
