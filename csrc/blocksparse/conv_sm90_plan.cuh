#pragma once
// What a tile of the Hopper kernel (conv_sm90.cu) multiplies: a bit for each step of 64 channels
// that is visited, and for each block column of it which of the tile's granules are live there.
#include "blocksparse/conv_tile.cuh"
#include "common/ptx.cuh"

namespace gossamer::blocksparse {

// How block columns lie in steps.
struct Steps {
  int log2_parts;  // block columns of a step: 4, 2 or 1
  int of_tap, count;
};

// The granules of a tile that are live in a column, kPlanBits of them, two columns a word.
constexpr int kPlanBits = 16;

struct Plan {
  SharedTile<uint32_t, kWgmmaColumns / 2> live;
  SharedTile<uint32_t, kWgmmaColumns / 32> visited;

  __device__ uint32_t of_column(int column) {
    return live[column / 2] >> (column % 2 * kPlanBits) & 0xffffu;
  }

  // The first step from `step` on that is visited; -1 where none is.
  __device__ int next(const Steps& steps, int step) {
    for (int word = step / 32; word * 32 < steps.count; ++word) {
      uint32_t bits = visited[word];
      if (word == step / 32) bits &= ~0u << step % 32;
      if (bits != 0) return word * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
    return -1;
  }

  __device__ void clear(const Steps& steps, int thread, int threads) {
    for (int i = thread; i < ((steps.count << steps.log2_parts) + 1) / 2; i += threads) live[i] = 0;
    for (int i = thread; i * 32 < steps.count; i += threads) visited[i] = 0;
  }

  // Notes the live blocks of a block row; called by a warp. `granules` of this tile, 0 for the row
  // of another whose steps this one visits with it. Indices that no check has seen give other
  // columns, but all within the weight.
  __device__ void add(const ConvLayout& layout, const Steps& steps, int64_t block_row,
                      uint32_t granules, int lane) {
    const int begin = min(max(layout.crow[block_row], 0), layout.nnz);
    const int end = min(max(layout.crow[block_row + 1], begin), layout.nnz);
    const auto last = static_cast<unsigned>(layout.block_columns - 1);
#pragma unroll 4
    for (int i = begin + lane; i < end; i += kWarp) {
      const unsigned column = min(static_cast<unsigned>(layout.col[i]), last);
      const unsigned tap = column / static_cast<unsigned>(layout.col_blocks);
      const unsigned within = column - tap * static_cast<unsigned>(layout.col_blocks);
      const unsigned at = (tap * static_cast<unsigned>(steps.of_tap) << steps.log2_parts) + within;
      const unsigned step = at >> steps.log2_parts;
      atomicOr(visited.data() + step / 32, 1u << step % 32);
      if (granules != 0) atomicOr(live.data() + at / 2, granules << (at % 2 * kPlanBits));
    }
  }
};

}  // namespace gossamer::blocksparse
