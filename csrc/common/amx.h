#pragma once
// Intel AMX: eight tiles of 16 rows x 64 bytes, and a product of two of them that adds to a third.
// Included by units compiled for it only; in the unnamed namespace, as simd_avx512.h is.
#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

// A thread that multiplies holds one of these. Tails are padded with zeros.
class Tiles {
 public:
  static constexpr int kRows = 16, kRowBytes = 64, kBytes = kRows * kRowBytes;

  Tiles() : Tiles(0, 1, kRowBytes) {}  // all of them whole
  // But for the first factor, whose rows have fewer bytes, and the second, which has fewer rows.
  Tiles(int first, int second, int bytes) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kRowBytes;
      config.rows[tile] = kRows;
    }
    config.row_bytes[first] = static_cast<uint16_t>(bytes);
    config.rows[second] = static_cast<uint8_t>(bytes / 4);
    asm volatile("" : : "r"(&config) : "memory");  // gcc's intrinsic names its first bytes only
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // gcc's tile intrinsics do not say that they read or write memory: between them and ordinary
  // accesses of the same memory stands this.
  static void fence() { asm volatile("" ::: "memory"); }
};

}  // namespace
}  // namespace gossamer
