#pragma once
// Hopper's own instructions (compile for sm_90a): mbarriers, the tensor memory accelerator (TMA),
// clusters of blocks and the asynchronous tensor cores of a warpgroup. An address of the block's
// own shared memory is one in shared::cluster as well. tests/emulation/twins/common/ptx_sm90.cuh is
// the host twin.
#include "common/ptx.cuh"
#include "common/tensor_map.cuh"

namespace gossamer::ptx {

// ---- mbarrier: a counter in shared memory of arrivals and of bytes to come ----------------------
//
// A phase ends when `count` threads have arrived and as many bytes as were expected have been
// copied. wait(parity) returns once the phase of that parity has ended: 0 for the first one.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void mbarrier_inval(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Between the initialisation and a __syncthreads(): makes it visible to the copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Arrives, as one of the `count`, when all that this thread has asked of cp.async is there.
__device__ __forceinline__ void mbarrier_arrive_cp_async(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// May give up early: call it in a loop, as mbarrier_wait does.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- copies of tiles ----------------------------------------------------------------------------
//
// One thread asks for a tile; its bytes count towards the barrier's phase. Coordinates are in
// elements, the contiguous dimension first, and may be negative; what lies outside the tensor is
// read as zero and not written. The tile in shared memory begins at a multiple of 128 bytes, with a
// swizzle at a multiple of 8 rows of it (1024 bytes for the 128-byte swizzle).

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_2d_hint(void* shared, const TensorMap* map,
                                                 uint64_t* barrier, int x, int y,
                                                 uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(l2_policy)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// The tile goes to the same address in each block of the cluster whose bit is set, and its bytes
// count towards the barrier at the same address there.
__device__ __forceinline__ void tma_load_2d_multicast(void* shared, const TensorMap* map,
                                                      uint64_t* barrier, int x, int y,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
// A tile of im2col_map(), whose first row belongs to base pixel (w, h) of image n, in the map's
// box. The next ones go by its steps along W, from the end of the box along W to its begin and a
// step along H, and from the end along H to the next image. A row is `channels` elements from c on
// of the pixel that lies (offset_w, offset_h), at most 255 each, behind the base pixel: with the
// offsets of a tap of the kernel, rows are the inputs of consecutive outputs under that tap.
__device__ __forceinline__ void tma_load_im2col(void* shared, const TensorMap* map,
                                                uint64_t* barrier, int c, int w, int h, int n,
                                                uint16_t offset_w, uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w),
      "h"(offset_h)
      : "memory");
}
__device__ __forceinline__ void tma_load_im2col_multicast(void* shared, const TensorMap* map,
                                                          uint64_t* barrier, int c, int w, int h,
                                                          int n, uint16_t offset_w,
                                                          uint16_t offset_h, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w),
      "h"(offset_h), "h"(blocks)
      : "memory");
}
// `bytes` contiguous bytes, a multiple of 16, between addresses that are.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Brings `bytes`, a multiple of 16, to the L2; nobody can tell when they are there.
__device__ __forceinline__ void bulk_prefetch(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// Stores read shared memory until tma_store_wait_read; what threads have written there needs
// fence_proxy_async and a barrier before.
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, const void* shared, int x,
                                             int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_store_3d(const TensorMap* map, const void* shared, int x, int y,
                                             int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
template <int Pending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// What this thread has written to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- a cluster (launch_cluster): blocks that reach each other's shared memory -------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all its blocks meet. A block must not leave while another may still reach it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// Arrives at the barrier that lies at the same address in block `rank`. It orders what this thread
// has read before what others write after; with .release.cluster, which would also make its writes
// visible there, ptxas waits at each arrival for all that the thread has under way.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// ---- a warp -------------------------------------------------------------------------------------

// True for one lane of the warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)::"memory");
  return elected != 0;
}
// Registers a thread may use, by all warps of a warpgroup; a multiple of 8 from 24 to 256.
template <int Registers>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
// The reverse of ldmatrix.
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
               "r"(r[0])
               : "memory");
}
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}
__device__ __forceinline__ void stmatrix_trans(void* row, const uint32_t (&r)[1]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(row)),
      "r"(r[0])
      : "memory");
}
__device__ __forceinline__ void stmatrix_trans(void* row, const uint32_t (&r)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}
__device__ __forceinline__ void stmatrix_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- wgmma: D[64][N] += A[64][K] B[K][N] of four warps, asynchronously --------------------------
//
// Warp w of the warpgroup has rows 16w to 16w + 15 of A and D, in the fragments of mma
// (common/ptx.cuh): d[4j + i] is register i of columns 8j to 8j + 7. K is 32 bytes of a row of B,
// twice that where A is sparse. wgmma_fence comes first, and again after registers were touched; d
// may be read after the wgmma_wait that covers its commit.

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// A matrix in shared memory whose rows run along K. With a swizzle of W bytes, a row is W bytes, at
// a W-byte pitch, and `stride` is the distance from 8 rows to the next 8; to advance along K inside
// the W bytes, add to the address. Without, 8 rows of 16 bytes lie together, `leading` is the
// distance to the next 16 bytes of K, and `stride` to the next 8 rows.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, Swizzle swizzle,
                                                      int leading, int stride) {
  const uint64_t mode = (4 - static_cast<unsigned>(swizzle)) % 4;  // none, 32, 64, 128: 0, 3, 2, 1
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffffu) >> 4}; };
  return field(shared_address(shared)) | field(leading) << 16 | field(stride) << 32 | mode << 62;
}

}  // namespace gossamer::ptx

#include "common/ptx_wgmma.cuh"
