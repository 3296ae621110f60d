// Kernels that do one thing each with Hopper's own instructions (common/ptx_sm90.cuh), as
// primitives.cu does for the rest. For nvcc: sm_90a.
#include "common/launch.cuh"
#include "common/ptx_sm90.cuh"
#include "kernels/exports.h"

namespace gossamer {
namespace {

// ---- wgmma --------------------------------------------------------------------------------------

enum class Kind : int64_t { kF16, kBF16, kS8, kE4M3 };

// What lies in shared memory: `bytes` from `from`, at offset 0 for A and kOperandBytes for B, the
// matrix itself `first` bytes in, as its descriptor says.
struct Operand {
  const uint8_t* from;
  int bytes, first, leading, stride;
};
constexpr int kOperandBytes = 64 << 10;

struct Wgmma {
  void* d;  // [128 threads][N / 2]
  Operand a, b;
  const uint32_t *a_registers, *metadata;  // [128][4], [128]; with registers, `a` is not used
  int swizzle;
};

template <class T, int N, bool kSparse, bool kRegisters, int Selector>
__global__ void __launch_bounds__(128) one_wgmma(const Wgmma args) {
  uint8_t* shared = shared_memory<uint8_t>();
  const int thread = threadIdx.x;
  for (int i = thread; i < args.a.bytes; i += 128) shared[i] = args.a.from[i];
  for (int i = thread; i < args.b.bytes; i += 128) shared[kOperandBytes + i] = args.b.from[i];
  ptx::fence_proxy_async();
  __syncthreads();

  auto* out = static_cast<ptx::Accumulator<T>*>(args.d) + thread * N / 2;
  ptx::Accumulator<T> d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = out[i];
  const auto describe = [&](const uint8_t* at, const Operand& operand) {
    return ptx::matrix_descriptor(at + operand.first, static_cast<Swizzle>(args.swizzle),
                                  operand.leading, operand.stride);
  };
  const uint64_t a = describe(shared, args.a), b = describe(shared + kOperandBytes, args.b);
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = args.a_registers[4 * thread + i];
  const uint32_t metadata = args.metadata[thread];
  ptx::wgmma_fence();
  if constexpr (kSparse && kRegisters) {
    ptx::wgmma_sp<T, N, Selector>(d, r, b, metadata, true);
  } else if constexpr (kSparse) {
    ptx::wgmma_sp<T, N, Selector>(d, a, b, metadata, true);
  } else if constexpr (kRegisters) {
    ptx::wgmma<T, N>(d, r, b, true);
  } else {
    ptx::wgmma<T, N>(d, a, b, true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[i] = d[i];
}

template <class T, bool kSparse, bool kRegisters, int Selector>
void run_wgmma(const Wgmma& args, int64_t n) {
  if constexpr (std::is_same_v<T, BFloat16> && kSparse && !kRegisters && Selector == 1) {
    if (n == 256) {
      launch(one_wgmma<T, 256, true, false, 1>, 1, 128, 2 * kOperandBytes, nullptr, args);
    }
  }
  if (n != 32) return;
  launch(one_wgmma<T, 32, kSparse, kRegisters, Selector>, 1, 128, 2 * kOperandBytes, nullptr, args);
}
template <class T>
void run_wgmma(const Wgmma& args, int64_t n, bool sparse, bool registers, bool selector) {
  if (!sparse) {
    registers ? run_wgmma<T, false, true, 0>(args, n) : run_wgmma<T, false, false, 0>(args, n);
  } else if (sizeof(T) == 2 && selector) {
    constexpr int kOne = sizeof(T) == 2 ? 1 : 0;
    registers ? run_wgmma<T, true, true, kOne>(args, n) : run_wgmma<T, true, false, kOne>(args, n);
  } else {
    registers ? run_wgmma<T, true, true, 0>(args, n) : run_wgmma<T, true, false, 0>(args, n);
  }
}

// ---- copies -------------------------------------------------------------------------------------

struct Tile {
  int rank, bytes;
  int at[3];
};

// The tile as it lies in shared memory goes to `raw`, and by TMA to where it was, in another
// tensor.
__global__ void copied_tile(uint8_t* raw, const __grid_constant__ TensorMap in,
                            const __grid_constant__ TensorMap out, const Tile tile) {
  struct Shared {
    SharedTile<uint8_t, 32 << 10, 1024> tile;
    uint64_t barrier;
  };
  Shared& shared = *shared_memory<Shared>();
  uint8_t* bytes = shared.tile.data();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&in);
  }
  __syncwarp();
  if (ptx::elect_one()) {
    ptx::mbarrier_arrive_expect_tx(&shared.barrier, tile.bytes);
    if (tile.rank == 2) {
      ptx::tma_load_2d(bytes, &in, &shared.barrier, tile.at[0], tile.at[1]);
    } else {
      ptx::tma_load_3d(bytes, &in, &shared.barrier, tile.at[0], tile.at[1], tile.at[2]);
    }
  }
  ptx::mbarrier_wait(&shared.barrier, 0);
  for (int i = threadIdx.x; i < tile.bytes; i += 32) raw[i] = bytes[i];
  if (ptx::elect_one()) {
    if (tile.rank == 2) {
      ptx::tma_store_2d(&out, bytes, tile.at[0], tile.at[1]);
    } else {
      ptx::tma_store_3d(&out, bytes, tile.at[0], tile.at[1], tile.at[2]);
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

// A tile for each block of a cluster of one or two, which brings it to all of them.
struct Im2colTiles {
  int bytes;  // of one
  int c;
  int first[2][3];  // w, h and n of its first base pixel, by block
  uint16_t offset_w, offset_h;
};

// The tiles as they lie in shared memory go to `raw`, those of one block after the other's.
__global__ void im2col_tiles(uint8_t* raw, const __grid_constant__ TensorMap in,
                             const Im2colTiles tiles) {
  struct Shared {
    SharedTile<uint8_t, 32 << 10, 1024> tiles;
    uint64_t barrier;
  };
  Shared& shared = *shared_memory<Shared>();
  const int rank = ptx::cluster_rank(), blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&in);
  }
  ptx::cluster_sync();
  const int bytes = blocks * tiles.bytes;
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.barrier, bytes);
    const auto [w, h, n] = tiles.first[rank];
    uint8_t* mine = shared.tiles.data() + rank * tiles.bytes;
    if (blocks == 1) {
      ptx::tma_load_im2col(mine, &in, &shared.barrier, tiles.c, w, h, n, tiles.offset_w,
                           tiles.offset_h);
    } else {
      ptx::tma_load_im2col_multicast(mine, &in, &shared.barrier, tiles.c, w, h, n, tiles.offset_w,
                                     tiles.offset_h, 3);
    }
  }
  ptx::mbarrier_wait(&shared.barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += 32) raw[rank * bytes + i] = shared.tiles[i];
  ptx::cluster_sync();  // the peer may write here until now
}

// Pieces of 64 bytes through one mbarrier, phase by phase.
__global__ void bulk_copies(uint8_t* out, const uint8_t* in, int pieces) {
  struct Shared {
    SharedTile<uint8_t, 64> piece;
    uint64_t barrier;
  };
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 32);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  for (int i = 0; i < pieces; ++i) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.barrier, 64);
      ptx::bulk_load(shared.piece.data(), in + 64 * i, 64, &shared.barrier);
    } else {
      ptx::mbarrier_arrive(&shared.barrier);
    }
    while (!ptx::mbarrier_try_wait(&shared.barrier, i % 2)) {
    }
    out[64 * i + 2 * threadIdx.x] = shared.piece[2 * threadIdx.x];
    out[64 * i + 2 * threadIdx.x + 1] = shared.piece[2 * threadIdx.x + 1];
    __syncwarp();
  }
  if (threadIdx.x == 0) ptx::mbarrier_inval(&shared.barrier);
}

// Pieces of 512 bytes, 16 a lane by cp.async; a lane reads what another one has copied.
__global__ void counted_copies(uint4* out, const uint4* in, int64_t pieces) {
  struct Shared {
    SharedTile<uint4, 64> pieces;
    uint64_t barrier;
  };
  Shared& shared = *shared_memory<Shared>();
  const int lane = threadIdx.x;
  if (lane == 0) ptx::mbarrier_init(&shared.barrier, 32);
  __syncwarp();
  for (int i = 0; i < pieces; ++i) {
    uint4* piece = shared.pieces.data() + i % 2 * 32;
    ptx::cp_async16(piece + lane, in + 32 * i + lane);
    ptx::mbarrier_arrive_cp_async(&shared.barrier);
    ptx::mbarrier_wait(&shared.barrier, i % 2);
    out[32 * i + lane] = piece[31 - lane];
  }
}

// Lane l's row is at `offsets[l]` bytes.
template <int Matrices, bool Transposed>
__global__ void store_matrices(uint8_t* bytes, const uint32_t* registers, const int* offsets,
                               int count) {
  uint8_t* shared = shared_memory<uint8_t>();
  for (int i = threadIdx.x; i < count; i += 32) shared[i] = 0;
  __syncwarp();
  uint32_t r[Matrices];
  for (int i = 0; i < Matrices; ++i) r[i] = registers[Matrices * threadIdx.x + i];
  if constexpr (Transposed) {
    ptx::stmatrix_trans(shared + offsets[threadIdx.x], r);
  } else {
    ptx::stmatrix(shared + offsets[threadIdx.x], r);
  }
  __syncwarp();
  for (int i = threadIdx.x; i < count; i += 32) bytes[i] = shared[i];
}

// Three warpgroups share the registers anew: 384 threads begin with 168 each.
__global__ void __launch_bounds__(384, 1) shared_registers(int* out) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    out[threadIdx.x] = 40;
  } else {
    ptx::setmaxnreg_inc<232>();
    out[threadIdx.x] = 232;
  }
}

// ---- misuse of an mbarrier ----------------------------------------------------------------------

__global__ void misused_mbarrier(int64_t how) {
  uint64_t* barrier = shared_memory<uint64_t>();
  if (how != 0) ptx::mbarrier_init(barrier, 1);
  if (how == 1) ptx::mbarrier_init(barrier, 1);
  if (how == 2) *barrier = 7;
  if (how == 3) ptx::mbarrier_wait(barrier, 0);
  if (how == 4) ptx::bulk_load(barrier + 2, barrier, 24, barrier);
  ptx::mbarrier_arrive(barrier);
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

// `layout`: bytes, first, leading and stride of A, then of B, then the swizzle.
GOSSAMER_EXPORT int one_wgmma(void* d, const uint8_t* a, const uint8_t* b,
                              const uint32_t* a_registers, const uint32_t* metadata,
                              const int64_t* layout, int64_t kind, int64_t n, int64_t sparse,
                              int64_t registers, int64_t selector, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const auto operand = [](const uint8_t* from, const int64_t* l) {
      return Operand{from, static_cast<int>(l[0]), static_cast<int>(l[1]), static_cast<int>(l[2]),
                     static_cast<int>(l[3])};
    };
    const Wgmma args{d,           operand(a, layout), operand(b, layout + 4),
                     a_registers, metadata,           static_cast<int>(layout[8])};
    switch (static_cast<Kind>(kind)) {
      case Kind::kF16: return run_wgmma<Float16>(args, n, sparse, registers, selector);
      case Kind::kBF16: return run_wgmma<BFloat16>(args, n, sparse, registers, selector);
      case Kind::kS8: return run_wgmma<int8_t>(args, n, sparse, registers, selector);
      case Kind::kE4M3: return run_wgmma<E4M3>(args, n, sparse, registers, selector);
    }
  });
}
// `shape`: the tensor's extents, the box and where it begins, three of each; tensors are contiguous
// but for a pitch of `pitch` bytes between rows.
GOSSAMER_EXPORT int copied_tile(uint8_t* raw, void* out, const void* in, const int64_t* shape,
                                int64_t rank, int64_t element_bytes, int64_t pitch, int64_t swizzle,
                                char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const int64_t strides[] = {pitch, pitch * shape[1]};
    int box[3], bytes = static_cast<int>(element_bytes);
    for (int i = 0; i < rank; ++i) bytes *= box[i] = static_cast<int>(shape[3 + i]);
    const auto map = [&](const void* data) {
      return tensor_map(data, static_cast<int>(element_bytes), static_cast<int>(rank), shape,
                        strides, box, static_cast<Swizzle>(swizzle));
    };
    const Tile tile{
        static_cast<int>(rank),
        bytes,
        {static_cast<int>(shape[6]), static_cast<int>(shape[7]), static_cast<int>(shape[8])}};
    launch(copied_tile, 1, 32, 34 << 10, nullptr, raw, map(in), map(out), tile);
  });
}
// `map`: C, W, H and N, then of W and H the corners and steps, then channels and pixels; pixels
// have a pitch of `pitch` bytes. `place`: the first channel, the two offsets, and for each of the
// `blocks` w, h and n.
GOSSAMER_EXPORT int im2col_tiles(uint8_t* raw, const void* in, const int64_t* map,
                                 int64_t element_bytes, int64_t pitch, int64_t swizzle,
                                 const int64_t* place, int64_t blocks, char* text,
                                 int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const int64_t strides[] = {pitch, pitch * map[1], pitch * map[1] * map[2]};
    int box[8];
    for (int i = 0; i < 8; ++i) box[i] = static_cast<int>(map[4 + i]);
    const TensorMap whole =
        im2col_map(in, static_cast<int>(element_bytes), map, strides, box, box + 2, box + 4, box[6],
                   box[7], static_cast<Swizzle>(swizzle));
    Im2colTiles tiles{};
    tiles.bytes = static_cast<int>(element_bytes) * box[6] * box[7];
    tiles.c = static_cast<int>(place[0]);
    tiles.offset_w = static_cast<uint16_t>(place[1]);
    tiles.offset_h = static_cast<uint16_t>(place[2]);
    for (int i = 0; i < 3 * blocks; ++i) tiles.first[i / 3][i % 3] = static_cast<int>(place[3 + i]);
    launch_cluster(static_cast<int>(blocks), im2col_tiles, static_cast<unsigned>(blocks), 32,
                   34 << 10, nullptr, raw, whole, tiles);
  });
}
GOSSAMER_EXPORT int im2col_of_tiled_map(const void* in, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const int64_t extents[] = {64, 2, 2, 2}, strides[] = {128, 256, 512};
    const int box[] = {64, 1, 1, 1};
    const TensorMap map = tensor_map(in, 2, 4, extents, strides, box, Swizzle::kNone);
    launch(im2col_tiles, 1, 32, 34 << 10, nullptr, nullptr, map, Im2colTiles{});
  });
}
GOSSAMER_EXPORT int bulk_copies(uint8_t* out, const uint8_t* in, int64_t pieces, char* text,
                                int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(bulk_copies, 1, 32, 1024, nullptr, out, in, pieces); });
}
GOSSAMER_EXPORT int counted_copies(uint4* out, const uint4* in, int64_t pieces, char* text,
                                   int64_t text_bytes) {
  return report(text, text_bytes,
                [&] { launch(counted_copies, 1, 32, 2048, nullptr, out, in, pieces); });
}
GOSSAMER_EXPORT int store_matrices(uint8_t* bytes, const uint32_t* registers, const int* offsets,
                                   int64_t count, int64_t matrices, int64_t transposed, char* text,
                                   int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const auto run = [&](auto kernel) {
      launch(kernel, 1, 32, count, nullptr, bytes, registers, offsets, count);
    };
    if (matrices == 1) run(transposed ? store_matrices<1, true> : store_matrices<1, false>);
    if (matrices == 2) run(transposed ? store_matrices<2, true> : store_matrices<2, false>);
    if (matrices == 4) run(transposed ? store_matrices<4, true> : store_matrices<4, false>);
  });
}
GOSSAMER_EXPORT int shared_registers(int* out, int64_t threads, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(shared_registers, 1, threads, 0, nullptr, out); });
}
GOSSAMER_EXPORT int misused_mbarrier(int64_t how, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] { launch(misused_mbarrier, 1, 1, 64, nullptr, how); });
}
