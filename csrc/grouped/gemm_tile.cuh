#pragma once
// What the products of experts share: which tile a thread block computes, and how its operands come
// into shared memory.
//
//   C [rows][columns] = A B, a tile of one expert's
//
//             rows      columns   inner       A                   B
//   kForward  tokens    n         k           x  [row][inner]     W  [column][inner]
//   kInput    tokens    k         n           dy [row][inner]     W  [inner][column]
//   kWeight   n         k         tokens      dy [inner][row]     x  [inner][column]
//
// Of kForward and kInput, tile i of expert e, whose tokens begin at b, is number b / R + e + i of
// those with R rows. An expert with t tokens has the numbers up to b / R + e + ceil(t / R), and the
// next one begins at (b + t) / R + e + 1, which is not less: so no two tiles share a number, T / R
// + E are enough for all, and whose a number is, is how many experts begin at or before it. No sums
// over the experts before, no table, nothing that the host would have to know. Numbers of nobody,
// at most one an expert, have nothing to do.
#include <type_traits>

#include "common/check.h"
#include "common/pieces.cuh"
#include "common/warp_tile.cuh"
#include "grouped/gemm_cuda.h"

namespace gossamer::grouped {

template <class T>  // as storage
struct ProductOperands {
  int64_t experts, tokens, n, k;
  const void* offsets;
  bool wide_offsets;
  const T *a, *b;
  int64_t a_stride, b_stride;
  const void* bias;
  Activation activation;
  void* out;
  bool a_pieces, b_pieces;  // whether they can be copied by 16 bytes

  explicit ProductOperands(const CudaGroupedArgs& args)
      : experts(args.experts),
        tokens(args.tokens),
        n(args.n),
        k(args.k),
        offsets(args.offsets),
        wide_offsets(args.wide_offsets),
        a(static_cast<const T*>(args.tokens_in)),
        b(static_cast<const T*>(args.other)),
        a_stride(args.tokens_stride),
        b_stride(args.product == CudaProduct::kWeight ? args.other_stride : args.k),
        bias(args.bias),
        activation(args.activation),
        out(args.out),
        a_pieces(in_pieces<T>(a, a_stride, args.product == CudaProduct::kForward ? k : n)),
        b_pieces(in_pieces<T>(b, b_stride, k)) {}

  // Where the tokens of an expert end, within the tensors whatever the offsets say.
  __device__ int64_t end_of(int64_t expert) const {
    const int64_t end = wide_offsets ? static_cast<const int64_t*>(offsets)[expert]
                                     : static_cast<const int32_t*>(offsets)[expert];
    return min(max(end, int64_t{0}), tokens);
  }
  __device__ int64_t begin_of(int64_t expert) const { return expert == 0 ? 0 : end_of(expert - 1); }
};

// The tile of this thread block, the same for all its threads.
struct ProductTile {
  int64_t expert;
  int rows, columns;    // that there are of it; no rows where there is nothing to do
  int64_t inner;        // steps
  int64_t a, b;         // elements before its first of A and of B
  int64_t out, across;  // before its first of C, and from a row of C to the next
  int64_t column;       // its first one

  template <class T>
  __device__ ProductTile(CudaProduct product, int tile_rows, int tile_columns,
                         const ProductOperands<T>& args) {
    across = product == CudaProduct::kForward ? args.n : args.k;
    const auto tiles = static_cast<unsigned>((across + tile_columns - 1) / tile_columns);
    const unsigned number = blockIdx.x / tiles;  // blocks of the same rows follow each other
    column = int64_t{blockIdx.x - number * tiles} * tile_columns;
    columns = static_cast<int>(min(across - column, int64_t{tile_columns}));
    int64_t row, left;
    if (product == CudaProduct::kWeight) {
      const auto of_expert = static_cast<unsigned>((args.n + tile_rows - 1) / tile_rows);
      expert = number / of_expert;
      row = int64_t{number % of_expert} * tile_rows;
      left = args.n - row;
      const int64_t begin = args.begin_of(expert);
      inner = max(args.end_of(expert) - begin, int64_t{0});
      a = begin * args.a_stride + row;
      b = begin * args.b_stride + column;
      out = (expert * args.n + row) * args.k + column;
    } else {
      expert = expert_of(number, tile_rows, args);
      const int64_t begin = args.begin_of(expert);
      row = (number - begin / tile_rows - expert) * tile_rows;
      left = args.end_of(expert) - begin - row;
      inner = product == CudaProduct::kForward ? args.k : args.n;
      a = (begin + row) * args.a_stride;
      b = expert * args.n * args.k + column * (product == CudaProduct::kForward ? args.k : 1);
      out = (begin + row) * across + column;
    }
    // A row before the first is of offsets that decrease.
    rows = row < 0 ? 0 : static_cast<int>(min(max(left, int64_t{0}), int64_t{tile_rows}));
  }

 private:
  // The last that begins at or before the tile. The first one always does.
  template <class T>
  static __device__ int64_t expert_of(unsigned number, int tile_rows,
                                      const ProductOperands<T>& args) {
    const int lane = threadIdx.x % kWarp;
    int before = 0;
    for (int64_t first = 0; first < args.experts; first += kWarp) {
      const int64_t e = first + lane;
      const bool begins = e < args.experts && args.begin_of(e) / tile_rows + e <= number;
      before += __popc(__ballot_sync(kAllLanes, begins));
    }
    return before - 1;
  }
};

// An operand's part of a stage: `kOuter` rows or columns of the tile, 32 steps.
template <class T, int kOuter, bool kTurned, int kThreads>
struct OperandStage {
  static constexpr int kEach = 16 / sizeof(T);
  static constexpr int kLineCount = kTurned ? kStageInner : kOuter;
  static constexpr int kLine = (kTurned ? kOuter : kStageInner) / kEach;  // pieces
  static constexpr int kPieces = kLineCount * kLine;
  using Kind = Lines<kLine, kTurned>;
  // Copies whose addresses a thread has at once: with all, the float32 kernel's sums spill.
  static constexpr int kTogether = sizeof(T) == 4 ? 2 : kPieces / kThreads;
  static_assert(kPieces % kThreads == 0);

  // `from` is the tile's first element; `outer` and `left` are what there is of it from `step` on.
  static __device__ void fill_from(uint4* to, const T* from, int64_t stride, int outer,
                                   int64_t step, int left, bool in_pieces) {
    const int lines = kTurned ? left : outer, elements = kTurned ? outer : left;
    from += kTurned ? step * stride : step;
#pragma unroll(kTogether)
    for (int i = 0; i < kPieces / kThreads; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      const int line = at / kLine, piece = at % kLine;
      const int bytes = line < lines ? bytes_of<sizeof(T)>(elements, piece) : 0;
      fill(to + place_of<kLine>(line, piece),
           bytes > 0 ? from + line * stride + kEach * piece : from, bytes, in_pieces);
    }
  }
};

template <CudaProduct kProduct>
constexpr bool kTurnsA = kProduct == CudaProduct::kWeight;
template <CudaProduct kProduct>
constexpr bool kTurnsB = kProduct != CudaProduct::kForward;

// Passes over the inner dimension: multiply(A's pieces, B's pieces) for each stage of 32 steps, one
// after the other, while cp.async fills the others.
template <class T, CudaProduct kProduct, int kRows, int kColumns, int kThreads, int kStages>
struct ProductStages {
  using A = OperandStage<T, kRows, kTurnsA<kProduct>, kThreads>;
  using B = OperandStage<T, kColumns, kTurnsB<kProduct>, kThreads>;
  static constexpr int kPieces = A::kPieces + B::kPieces;

  template <class Multiply>
  static __device__ __forceinline__ void run(const ProductOperands<T>& args,
                                             const ProductTile& tile, uint4* stages,
                                             const Multiply& multiply) {
    const T *a = args.a + tile.a, *b = args.b + tile.b;
    int stage = 0, filled = 0;  // the one to multiply, and the one to fill
#pragma unroll 1  // the first passes only fill: so the code that does it is there once
    for (int64_t step = int64_t{1 - kStages} * kStageInner; step < tile.inner;
         step += kStageInner) {
      if (step >= 0) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there, and nobody reads the one before it any more
      }
      const int64_t next = step + int64_t{kStages - 1} * kStageInner;
      if (next < tile.inner) {
        const int left = static_cast<int>(min(tile.inner - next, int64_t{kStageInner}));
        uint4* to = stages + filled * kPieces;
        A::fill_from(to, a, args.a_stride, tile.rows, next, left, args.a_pieces);
        B::fill_from(to + A::kPieces, b, args.b_stride, tile.columns, next, left, args.b_pieces);
      }
      ptx::cp_async_commit();  // also an empty group: waits count groups
      filled = filled + 1 == kStages ? 0 : filled + 1;
      if (step < 0) continue;
      multiply(stages + stage * kPieces, stages + stage * kPieces + A::kPieces);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
  }
};

// launch(std::integral_constant<CudaProduct, ...>) of the product that the arguments ask for.
template <class Launch>
void for_product(CudaProduct product, const Launch& launch) {
  using P = CudaProduct;
  switch (product) {
    case P::kForward: return launch(std::integral_constant<P, P::kForward>{});
    case P::kInput: return launch(std::integral_constant<P, P::kInput>{});
    case P::kWeight: return launch(std::integral_constant<P, P::kWeight>{});
  }
}

}  // namespace gossamer::grouped
