#pragma once
// AMX by its definition. What the instructions would refuse ends the process with a line, and tiles
// that were let go hold NaN.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED_TILES_CHECK(condition)                                              \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: AMX needs %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

namespace emulated {

struct Tile {
  uint16_t row_bytes = 0;
  uint8_t rows = 0;
  uint8_t bytes[16][64] = {};

  int words() const { return row_bytes / 4; }
  template <class T>
  T at(int row, int place) const {
    T value;
    std::memcpy(&value, bytes[row] + place * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(int row, int place, T value) {
    std::memcpy(bytes[row] + place * sizeof(T), &value, sizeof(T));
  }
};

inline thread_local std::array<Tile, 8> tiles;

inline Tile& configured(int which) {
  EMULATED_TILES_CHECK(tiles[which].rows > 0);
  return tiles[which];
}

inline void load_config(const void* from) {
  const auto* config = static_cast<const uint8_t*>(from);
  EMULATED_TILES_CHECK(config[0] == 1 && config[1] == 0);  // palette, start row
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, 2);
    const uint8_t rows = config[48 + i];
    EMULATED_TILES_CHECK(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0));
    EMULATED_TILES_CHECK(i < 8 || rows == 0);
    if (i < 8) tiles[i] = {row_bytes, rows};
  }
}

inline void release() {
  for (Tile& tile : tiles) {
    tile.rows = 0;
    std::memset(tile.bytes, 0xff, sizeof tile.bytes);
  }
}

inline void zero(int which) { std::memset(configured(which).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int which, const void* from, int64_t stride) {
  zero(which);
  Tile& tile = tiles[which];
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.bytes[r], static_cast<const char*>(from) + r * stride, tile.row_bytes);
  }
}

inline void store(int which, void* to, int64_t stride) {
  const Tile& tile = configured(which);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
  }
}

// Adds to every word of a tile what `dot` makes of a row of the first factor and a column of the
// second.
template <class Dot>
void multiply(int to, int first, int second, const Dot& dot) {
  EMULATED_TILES_CHECK(to != first && to != second && first != second);
  Tile& c = configured(to);
  const Tile &a = configured(first), &b = configured(second);
  EMULATED_TILES_CHECK(a.rows == c.rows && b.row_bytes == c.row_bytes && a.words() == b.rows);
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.words(); ++n) dot(a, b, c, m, n);
  }
}

inline float without_subnormals(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float widen(uint16_t bfloat16) {
  return without_subnormals(std::bit_cast<float>(uint32_t{bfloat16} << 16));
}

// Even and odd columns are summed up apart.
inline void multiply_bfloat16(int to, int first, int second) {
  multiply(to, first, second, [](const Tile& a, const Tile& b, Tile& c, int m, int n) {
    float sums[2] = {};
    for (int k = 0; k < a.words(); ++k) {
      for (int odd = 0; odd < 2; ++odd) {
        sums[odd] = without_subnormals(std::fma(widen(a.at<uint16_t>(m, 2 * k + odd)),
                                                widen(b.at<uint16_t>(k, 2 * n + odd)), sums[odd]));
      }
    }
    const float sum = without_subnormals(sums[0] + sums[1]);
    c.set(m, n, without_subnormals(without_subnormals(c.at<float>(m, n)) + sum));
  });
}

inline void multiply_int8(int to, int first, int second) {
  multiply(to, first, second, [](const Tile& a, const Tile& b, Tile& c, int m, int n) {
    auto sum = c.at<uint32_t>(m, n);  // wraps around
    for (int k = 0; k < a.words(); ++k) {
      for (int i = 0; i < 4; ++i) {
        sum += static_cast<uint32_t>(a.at<int8_t>(m, 4 * k + i) * b.at<int8_t>(k, 4 * n + i));
      }
    }
    c.set(m, n, sum);
  });
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::multiply_bfloat16
#define _tile_dpbssd emulated::multiply_int8
