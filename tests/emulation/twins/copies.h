#pragma once
// Loads, stores and copies: cp.async, ldmatrix, cached and uncached 16-byte accesses.
#include "twins/warp.h"

namespace gossamer::emulation {

inline void check_aligned(const void* address, size_t alignment, const char* what,
                          const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fault(site, what, ": the global address is not a multiple of ", alignment);
  }
}

// Under AddressSanitizer: that somebody allocated these bytes.
inline void check_readable(const void* from, size_t count, const char* what, const Site& site) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bad = __asan_region_is_poisoned(const_cast<void*>(from), count);
  if (bad != nullptr) {
    fault(site, what, ": reads out of bounds, byte ",
          static_cast<const char*>(bad) - static_cast<const char*>(from), " of its ", count);
  }
#else
  (void)from, (void)count, (void)what, (void)site;
#endif
}

inline void land(const Copy& copy) {
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
  std::memcpy(copy.to, copy.from, copy.valid);
}

template <int Bytes>
void cp_async(const char* name, void* to, const void* from, int valid, const Site& site) {
  if (valid < 0 || valid > Bytes) fault(site, name, ": ", valid, " valid bytes");
  block->shared.check(to, Bytes, Bytes, name, site);
  check_aligned(from, Bytes, name, site);
  check_readable(from, valid, name, site);
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), Bytes,
                  valid, site};
  if (schedule.early) {
    land(copy);
  } else {
    poison(copy.to, Bytes);  // from now until it lands, the bytes may be anything
  }
  running->open_copies.push_back(copy);
}

// Matrix m has the eight rows of 16 bytes that lanes 8m to 8m + 7 point at. Lane l = 4g + t gets,
// in register m, elements 2t and 2t + 1 of row g, or transposed: element g of rows 2t and 2t + 1.
template <int Matrices, bool Transposed>
void load_matrices(const char* name, uint32_t (&out)[Matrices], const void* row, const Site& site) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  if (running->lane < 8 * Matrices) block->shared.check(row, 16, 16, name, site);
  using Row = const uint16_t*;
  whole_warp(
      name, static_cast<Row>(row), out,
      [](const Row* const(&rows)[kWarpSize], uint32_t (*const(&outs)[kWarpSize])[Matrices]) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int m = 0; m < Matrices; ++m) {
            const Row* const* first = rows + 8 * m;
            const uint16_t low = Transposed ? (*first[2 * t])[g] : (*first[g])[2 * t];
            const uint16_t high = Transposed ? (*first[2 * t + 1])[g] : (*first[g])[2 * t + 1];
            (*outs[lane])[m] = low | static_cast<uint32_t>(high) << 16;
          }
        }
      },
      site);
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

using emulation::Site;

// ---- cp.async -----------------------------------------------------------------------------------

inline void cp_async16(void* shared, const void* global, int valid_bytes = 16,
                       Site site = Site::current()) {
  emulation::cp_async<16>("cp_async16", shared, global, valid_bytes, site);
}
inline void cp_async16_hint(void* shared, const void* global, int valid_bytes, uint64_t,
                            Site site = Site::current()) {
  emulation::cp_async<16>("cp_async16_hint", shared, global, valid_bytes, site);
}
inline void cp_async8(void* shared, const void* global, int valid_bytes = 8,
                      Site site = Site::current()) {
  emulation::cp_async<8>("cp_async8", shared, global, valid_bytes, site);
}
inline void cp_async4(void* shared, const void* global, int valid_bytes = 4,
                      Site site = Site::current()) {
  emulation::cp_async<4>("cp_async4", shared, global, valid_bytes, site);
}
inline void cp_async_commit() {
  emulation::Thread& thread = *emulation::running;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}
template <int Pending>
void cp_async_wait() {
  auto& groups = emulation::running->copy_groups;
  while (groups.size() > Pending) {
    if (!emulation::schedule.early) {
      for (const emulation::Copy& copy : groups.front()) emulation::land(copy);
    }
    groups.pop_front();
  }
}

// ---- ldmatrix -----------------------------------------------------------------------------------

template <int Matrices>
void ldmatrix(uint32_t (&out)[Matrices], const void* row, Site site = Site::current()) {
  emulation::load_matrices<Matrices, false>("ldmatrix", out, row, site);
}
template <int Matrices>
void ldmatrix_trans(uint32_t (&out)[Matrices], const void* row, Site site = Site::current()) {
  emulation::load_matrices<Matrices, true>("ldmatrix_trans", out, row, site);
}

// ---- 16 bytes from and to global memory ---------------------------------------------------------

inline uint64_t l2_evict_first() { return 1; }
inline uint64_t l2_evict_last() { return 2; }

inline uint4 load_nc16(const void* global, Site site = Site::current()) {
  emulation::check_aligned(global, 16, "load_nc16", site);
  return *static_cast<const uint4*>(global);
}
inline uint4 load_nc16_hint(const void* global, uint64_t, Site site = Site::current()) {
  emulation::check_aligned(global, 16, "load_nc16_hint", site);
  return *static_cast<const uint4*>(global);
}
inline uint4 load16(const void* global, Site site = Site::current()) {
  emulation::check_aligned(global, 16, "load16", site);
  return *static_cast<const uint4*>(global);
}
inline void store16(void* global, uint4 value, Site site = Site::current()) {
  emulation::check_aligned(global, 16, "store16", site);
  *static_cast<uint4*>(global) = value;
}
inline void store16_stream(void* global, uint4 value, Site site = Site::current()) {
  emulation::check_aligned(global, 16, "store16_stream", site);
  *static_cast<uint4*>(global) = value;
}

// ---- flags and counters between blocks ----------------------------------------------------------

// Clusters run one after another: what an earlier one will have released is there, and to wait for
// a later one is a deadlock here, as it can be on a GPU whose blocks do not all fit.
inline int32_t load_acquire(const int32_t* global, Site site = Site::current()) {
  emulation::block->poll("load_acquire", site);
  return *global;
}
inline void store_release(int32_t* global, int32_t value) {
  *global = value;
  emulation::block->changed();
}
inline void add_release(int32_t* global, int32_t value) {
  *global = static_cast<int32_t>(static_cast<uint32_t>(*global) + static_cast<uint32_t>(value));
  emulation::block->changed();
}

}  // namespace gossamer::ptx
