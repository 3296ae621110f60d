#include "common/amx.h"
#include "probe/probe_loops.h"

namespace gossamer::probe {

float tiles_amx_bf16(int64_t steps) {
  // As for vectors, every sum adds 1 and -1 in turn. With zeros the unit would draw less power and
  // run at a higher clock.
  alignas(64) uint32_t ones[16][16], signs[16][16];
  alignas(64) float sums[16][16];
  for (int row = 0; row < 16; ++row) {
    for (int word = 0; word < 16; ++word) {
      ones[row][word] = 0x3f803f80u;
      signs[row][word] = 0xbf803f80u;
      sums[row][word] = static_cast<float>(row);
    }
  }
  const Tiles tiles;
  Tiles::fence();
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums, 64);
  _tile_loadd(2, sums, 64);
  _tile_loadd(3, sums, 64);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, signs, 64);
  _tile_loadd(7, signs, 64);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  Tiles::fence();
  return sums[1][0];
}

}  // namespace gossamer::probe
