#pragma once
// mbarriers and the copies of the tensor memory accelerator (TMA).
#include "common/tensor_map.cuh"
#include "runtime/cluster.h"
#include "twins/copies.h"

namespace gossamer::emulation {

// Where a swizzle puts the byte at `offset` of shared memory: 16-byte chunks move, by the xor of
// address bits 4 and up with bits 7 and up.
inline size_t swizzled(size_t offset, Swizzle swizzle) {
  const size_t bits = (size_t{1} << static_cast<int>(swizzle)) - 1;
  return offset ^ ((offset >> 7 & bits) << 4);
}

// The element at these coordinates, as many as the map has dimensions; null: outside the tensor.
inline unsigned char* element_at(const TensorMap& map, const int64_t* where) {
  unsigned char* global = map.global;
  for (int i = 0; i < map.rank; ++i) {
    if (where[i] < 0 || where[i] >= map.extents[i]) return nullptr;
    global += where[i] * map.strides[i];
  }
  return global;
}

// The bytes of a tile that begins at `at` in elements: `element` is called with the offset in the
// tile and the address in global memory (null: outside the tensor) of each element.
template <class Element>
void each_element(const TensorMap& map, const std::array<int, 3>& at, const Element& element) {
  size_t offset = 0;
  for (int z = 0; z < (map.rank > 2 ? map.box[2] : 1); ++z) {
    for (int y = 0; y < (map.rank > 1 ? map.box[1] : 1); ++y) {
      for (int x = 0; x < map.box[0]; ++x, offset += static_cast<size_t>(map.element_bytes)) {
        const int64_t where[3] = {int64_t{at[0]} + x, int64_t{at[1]} + y, int64_t{at[2]} + z};
        element(offset, element_at(map, where));
      }
    }
  }
}

// Where a tile in im2col mode begins: its first channel and base pixel; and how far behind each
// base pixel the one lies that is read.
struct Im2colPlace {
  int c, w, h, n;
  int offset_w, offset_h;
};

inline int64_t last_of_box(const TensorMap& map, int axis) {
  return map.extents[1 + axis] - 1 + map.upper[axis];
}

// The same for a tile in im2col mode.
template <class Element>
void each_element(const TensorMap& map, const Im2colPlace& at, const Element& element) {
  size_t offset = 0;
  int64_t w = at.w, h = at.h, n = at.n;
  for (int pixel = 0; pixel < map.box[1]; ++pixel) {
    for (int i = 0; i < map.box[0]; ++i, offset += static_cast<size_t>(map.element_bytes)) {
      const int64_t where[4] = {int64_t{at.c} + i, w + at.offset_w, h + at.offset_h, n};
      element(offset, element_at(map, where));
    }
    w += map.steps[0];
    if (w <= last_of_box(map, 0)) continue;
    w = map.lower[0];
    h += map.steps[1];
    if (h <= last_of_box(map, 1)) continue;
    h = map.lower[1];
    ++n;
  }
}

inline size_t tile_bytes(const TensorMap& map) {
  size_t bytes = static_cast<size_t>(map.element_bytes);
  for (int i = 0; i < map.rank; ++i) bytes *= static_cast<size_t>(map.box[i]);
  return bytes;
}

// The tile's offset in shared memory. The swizzle goes by the address, so a tile has to begin where
// its pattern does.
inline size_t check_tile(const void* shared, const TensorMap& map, int rank, bool im2col,
                         const char* name, const Site& site) {
  if (map.rank != rank) fault(site, name, ": the tensor map has ", map.rank, " dimensions");
  if (map.im2col != im2col) fault(site, name, ": the tensor map is of the other mode");
  const size_t alignment =
      map.swizzle == Swizzle::kNone ? 128 : size_t{128} << static_cast<int>(map.swizzle);
  return block->shared.check(shared, tile_bytes(map), alignment, name, site);
}

inline void check_place(const TensorMap& map, const Im2colPlace& at, const char* name,
                        const Site& site) {
  const int base[] = {at.w, at.h}, offset[] = {at.offset_w, at.offset_h};
  for (int i = 0; i < 2; ++i) {
    if (base[i] < map.lower[i] || base[i] > last_of_box(map, i)) {
      fault(site, name, ": a base pixel at ", base[i], ", outside the box from ", map.lower[i],
            " to ", last_of_box(map, i));
    }
    if (offset[i] > 255) fault(site, name, ": an offset of ", offset[i], " does not fit 8 bits");
  }
}

// The mbarrier at the same shared address in another block of the cluster.
inline uint64_t* in_block(Block& peer, uint64_t* barrier) {
  const auto* here = reinterpret_cast<unsigned char*>(barrier);
  return reinterpret_cast<uint64_t*>(peer.shared.begin() + (here - block->shared.begin()));
}

// The tile goes to the same shared address in `target`, which may be another block of the cluster.
template <class Place>
void tma_load(const char* name, Block& target, void* shared, const TensorMap* map,
              uint64_t* barrier, int rank, const Place& at, const Site& site) {
  constexpr bool kIm2col = std::is_same_v<Place, Im2colPlace>;
  const size_t to = check_tile(shared, *map, rank, kIm2col, name, site);
  if constexpr (kIm2col) check_place(*map, at, name, site);
  const size_t bytes = tile_bytes(*map);
  const std::vector<unsigned char> unknown(bytes, kPoison);
  target.shared.async_write(to, unknown.data(), bytes);
  target.transactions.submit(
      in_block(target, barrier), static_cast<int>(bytes),
      [=, &target, map = *map] {
        constexpr unsigned char kZeros[8] = {};
        each_element(map, at, [&](size_t offset, const unsigned char* global) {
          target.shared.async_write(swizzled(to + offset, map.swizzle),
                                    global == nullptr ? kZeros : global,
                                    static_cast<size_t>(map.element_bytes));
        });
      },
      name, site);
}

// The tile goes to every block of the cluster whose bit is set.
template <class Place>
void tma_multicast(const char* name, uint16_t blocks, void* shared, const TensorMap* map,
                   uint64_t* barrier, int rank, const Place& at, const Site& site) {
  if (blocks == 0) fault(site, name, ": to no block");
  for (int i = 0; i < 16; ++i) {
    if ((blocks >> i & 1) == 0) continue;
    tma_load(name, block->cluster.peer(i, name, site), shared, map, barrier, rank, at, site);
  }
}

inline void tma_store(const char* name, const TensorMap* map, const void* shared, int rank,
                      const std::array<int, 3>& at, const Site& site) {
  const size_t from = check_tile(shared, *map, rank, false, name, site);
  const auto land = [=, map = *map] {
    each_element(map, at, [&](size_t offset, unsigned char* global) {
      const size_t source = swizzled(from + offset, map.swizzle);
      const auto bytes = static_cast<size_t>(map.element_bytes);
      const unsigned char* read = block->shared.async_read(source, bytes, name, site);
      if (global != nullptr) std::memcpy(global, read, bytes);
    });
  };
  if (schedule.early) {
    land();
    running->open_stores.push_back({[] {}, site});
  } else {
    running->open_stores.push_back({land, site});
  }
}

inline void finish_stores(size_t pending) {
  auto& groups = running->store_groups;
  while (groups.size() > pending) {
    const std::vector<Store> group = std::move(groups.front());
    groups.pop_front();
    for (const Store& store : group) store.land();
  }
}

}  // namespace gossamer::emulation

namespace gossamer::ptx {

// ---- mbarrier -----------------------------------------------------------------------------------

inline void mbarrier_init(uint64_t* barrier, int count, Site site = Site::current()) {
  emulation::block->transactions.init(barrier, count, site);
}
inline void mbarrier_inval(uint64_t* barrier, Site site = Site::current()) {
  emulation::block->transactions.inval(barrier, site);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::current()) {
  emulation::block->transactions.arrive(barrier, 0, "mbarrier_arrive", site);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site = Site::current()) {
  emulation::block->transactions.arrive(barrier, bytes, "mbarrier_arrive_expect_tx", site);
}
inline void mbarrier_arrive_remote(uint64_t* barrier, int rank, Site site = Site::current()) {
  const char* name = "mbarrier_arrive_remote";
  emulation::Block& peer = emulation::block->cluster.peer(rank, name, site);
  peer.transactions.arrive(emulation::in_block(peer, barrier), 0, name, site);
}
// All copies of this thread that no wait has covered land together, and with them the arrival.
inline void mbarrier_arrive_cp_async(uint64_t* barrier, Site site = Site::current()) {
  emulation::Thread& thread = *emulation::running;
  std::vector<emulation::Copy> copies;
  for (auto& group : thread.copy_groups) copies.insert(copies.end(), group.begin(), group.end());
  thread.copy_groups.clear();
  copies.insert(copies.end(), thread.open_copies.begin(), thread.open_copies.end());
  thread.open_copies.clear();
  emulation::block->transactions.submit_arrival(
      barrier,
      [copies = std::move(copies)] {
        if (emulation::schedule.early) return;  // they have landed already
        for (const emulation::Copy& copy : copies) emulation::land(copy);
      },
      "mbarrier_arrive_cp_async", site);
}
// Gives up early now and then in a random schedule, as the hardware may; otherwise waits.
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  emulation::Block& block = *emulation::block;
  const char* name = "mbarrier_try_wait";
  if (block.transactions.ended(barrier, parity, name, site)) return true;
  if (emulation::schedule.seed != 0 && block.random.below(4) == 0) {
    block.poll(name, site);
  } else {
    block.transactions.wait(barrier, name, site);
  }
  return block.transactions.ended(barrier, parity, name, site);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::current()) {
  while (!mbarrier_try_wait(barrier, parity, site)) {
  }
}

// ---- copies of tiles ----------------------------------------------------------------------------

inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                        Site site = Site::current()) {
  emulation::tma_load("tma_load_2d", *emulation::block, shared, map, barrier, 2,
                      std::array{x, y, 0}, site);
}
inline void tma_load_2d_hint(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y,
                             uint64_t, Site site = Site::current()) {
  emulation::tma_load("tma_load_2d_hint", *emulation::block, shared, map, barrier, 2,
                      std::array{x, y, 0}, site);
}
inline void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z,
                        Site site = Site::current()) {
  emulation::tma_load("tma_load_3d", *emulation::block, shared, map, barrier, 3,
                      std::array{x, y, z}, site);
}
inline void tma_load_2d_multicast(void* shared, const TensorMap* map, uint64_t* barrier, int x,
                                  int y, uint16_t blocks, Site site = Site::current()) {
  emulation::tma_multicast("tma_load_2d_multicast", blocks, shared, map, barrier, 2,
                           std::array{x, y, 0}, site);
}
inline void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int c, int w,
                            int h, int n, uint16_t offset_w, uint16_t offset_h,
                            Site site = Site::current()) {
  const emulation::Im2colPlace at{c, w, h, n, offset_w, offset_h};
  emulation::tma_load("tma_load_im2col", *emulation::block, shared, map, barrier, 4, at, site);
}
inline void tma_load_im2col_multicast(void* shared, const TensorMap* map, uint64_t* barrier, int c,
                                      int w, int h, int n, uint16_t offset_w, uint16_t offset_h,
                                      uint16_t blocks, Site site = Site::current()) {
  const emulation::Im2colPlace at{c, w, h, n, offset_w, offset_h};
  emulation::tma_multicast("tma_load_im2col_multicast", blocks, shared, map, barrier, 4, at, site);
}
inline void bulk_prefetch(const void* global, int bytes, Site site = Site::current()) {
  using namespace emulation;
  if (bytes < 16 || bytes % 16 != 0) fault(site, "bulk_prefetch: ", bytes, " bytes");
  check_aligned(global, 16, "bulk_prefetch", site);
  check_readable(global, static_cast<size_t>(bytes), "bulk_prefetch", site);
}
inline void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier,
                      Site site = Site::current()) {
  using namespace emulation;
  if (bytes < 16 || bytes % 16 != 0) fault(site, "bulk_load: ", bytes, " bytes");
  const auto count = static_cast<size_t>(bytes);
  const size_t to = block->shared.check(shared, count, 16, "bulk_load", site);
  check_aligned(global, 16, "bulk_load", site);
  check_readable(global, count, "bulk_load", site);
  const std::vector<unsigned char> unknown(count, kPoison);
  block->shared.async_write(to, unknown.data(), count);
  block->transactions.submit(
      barrier, bytes, [=] { block->shared.async_write(to, global, count); }, "bulk_load", site);
}
inline void tma_store_2d(const TensorMap* map, const void* shared, int x, int y,
                         Site site = Site::current()) {
  emulation::tma_store("tma_store_2d", map, shared, 2, {x, y, 0}, site);
}
inline void tma_store_3d(const TensorMap* map, const void* shared, int x, int y, int z,
                         Site site = Site::current()) {
  emulation::tma_store("tma_store_3d", map, shared, 3, {x, y, z}, site);
}
inline void tma_store_commit() {
  emulation::Thread& thread = *emulation::running;
  thread.store_groups.push_back(std::exchange(thread.open_stores, {}));
}
template <int Pending>
void tma_store_wait() {
  emulation::finish_stores(Pending);
}
template <int Pending>
void tma_store_wait_read() {
  emulation::finish_stores(Pending);
}
inline void fence_proxy_async() { emulation::block->shared.publish(); }

}  // namespace gossamer::ptx
