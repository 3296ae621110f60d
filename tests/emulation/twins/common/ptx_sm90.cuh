#pragma once
// The host twin of csrc/common/ptx_sm90.cuh.
#include "common/ptx.cuh"
#include "twins/tma.h"
#include "twins/wgmma.h"

namespace gossamer::emulation {

// Matrix m's row r goes to where lane 8m + r points: the reverse of load_matrices.
template <int Matrices, bool Transposed>
void store_matrices(const char* name, void* row, const uint32_t (&r)[Matrices], const Site& site) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  if (running->lane < 8 * Matrices) block->shared.check(row, 16, 16, name, site);
  using Row = uint16_t*;
  Row to = static_cast<Row>(row);
  whole_warp(
      name, r, to,
      [](const uint32_t (*const(&in)[kWarpSize])[Matrices], Row* const(&rows)[kWarpSize]) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int m = 0; m < Matrices; ++m) {
            Row* const* first = rows + 8 * m;
            for (int half = 0; half < 2; ++half) {
              const auto value = static_cast<uint16_t>((*in[lane])[m] >> (16 * half));
              (Transposed ? (*first[2 * t + half])[g] : (*first[g])[2 * t + half]) = value;
            }
          }
        }
      },
      site);
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

inline int cluster_rank() { return emulation::block->rank; }
inline void cluster_sync(Site site = Site::current()) { emulation::block->cluster.sync(site); }

inline bool elect_one(Site site = Site::current()) {
  int none = 0;
  bool elected = false;
  emulation::whole_warp(
      "elect_one", none, elected,
      [](const auto&, const auto& out) {  // any lane may be the one
        using namespace emulation;
        *out[schedule.seed == 0 ? 0 : block->random.below(kWarpSize)] = true;
      },
      site);
  return elected;
}
template <int Registers>
void setmaxnreg_dec(Site site = Site::current()) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  emulation::block->check_warpgroup("setmaxnreg_dec", site);
  emulation::on_products("setmaxnreg_dec", [](auto&) {}, site);
}
template <int Registers>
void setmaxnreg_inc(Site site = Site::current()) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  emulation::block->check_warpgroup("setmaxnreg_inc", site);
  emulation::on_products("setmaxnreg_inc", [](auto&) {}, site);
}
template <int Matrices>
void stmatrix(void* row, const uint32_t (&r)[Matrices], Site site = Site::current()) {
  emulation::store_matrices<Matrices, false>("stmatrix", row, r, site);
}
template <int Matrices>
void stmatrix_trans(void* row, const uint32_t (&r)[Matrices], Site site = Site::current()) {
  emulation::store_matrices<Matrices, true>("stmatrix_trans", row, r, site);
}

}  // namespace gossamer::ptx
