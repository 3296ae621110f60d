#pragma once
// What a warp multiplies by tensor cores, of 16-bit floats whose rows lie in shared memory in
// pieces (pieces.cuh), and how its sums become rows of the result.
//
//   C [rows][columns] += A B, of 32 steps along the inner dimension, in two halves
//
// An operand lies there in lines of either kind; a turned one goes through ldmatrix.trans:
//
//   straight  A [row][inner]    B [column][inner]
//   turned    A [inner][row]    B [inner][column]
#include "common/pieces.cuh"
#include "common/stored_run.cuh"
#include "common/warp.cuh"

namespace gossamer {

// Pieces of 16 bytes that a line of an operand has, and of which kind it is.
template <int kLine, bool kTurned>
struct Lines {
  static constexpr int kPieces = kLine;
  static constexpr bool kIsTurned = kTurned;
};

template <class T, int kRowTiles, int kColumnTiles>  // of 16 rows and of 8 columns
struct WarpTile {
  static constexpr int kRows = 16 * kRowTiles, kColumns = 8 * kColumnTiles;
  static constexpr int kSumRows = 16;                  // that go through shared memory at once
  static constexpr int kSumStride = kColumns + 4;      // so that lanes write to different banks
  static constexpr int kSums = kSumRows * kSumStride;  // floats
  static_assert(kColumnTiles % 2 == 0);

  float sum[kRowTiles][kColumnTiles][4] = {};

  // The warp's tile begins at this row of a and column of b.
  template <class A, class B>
  __device__ __forceinline__ void multiply_half(const uint4* a, int row, const uint4* b, int column,
                                                int half, int lane) {
    uint32_t rows[kRowTiles][4];
    // Lane 8m + r gives ldmatrix row r of matrix m. Of A those are rows 0-7 and 8-15 at steps 0-7,
    // then at steps 8-15; of B steps 0-7 and 8-15 of columns 0-7, then of columns 8-15.
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if constexpr (A::kIsTurned) {
        const int step = 16 * half + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_trans(rows[i],
                            a + place_of<A::kPieces>(step, row / 8 + 2 * i + lane / 8 % 2));
      } else {
        ptx::ldmatrix(rows[i],
                      a + place_of<A::kPieces>(row + 16 * i + lane % 16, 2 * half + lane / 16));
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t two[4];
      if constexpr (B::kIsTurned) {
        ptx::ldmatrix_trans(
            two, b + place_of<B::kPieces>(16 * half + lane % 16, column / 8 + j + lane / 16));
      } else {
        const int at = column + 8 * j + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix(two, b + place_of<B::kPieces>(at, 2 * half + lane / 8 % 2));
      }
      const uint32_t low[2] = {two[0], two[1]}, high[2] = {two[2], two[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(sum[i][j], rows[i], low);
        ptx::mma_m16n8k16<T>(sum[i][j + 1], rows[i], high);
      }
    }
  }

  // Through shared memory, of which the warp has kSums floats, from fragments, in which a lane's
  // columns lie 8 apart, to rows of them. row_of(row) is where the row's first column goes, or
  // null; `count` columns are there. The bias is that of the first one.
  template <class RowOf>
  __device__ __forceinline__ void store(float* sums, const T* bias, Activation activation,
                                        int count, int lane, const RowOf& row_of) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (8 * half + lane / 4) * kSumStride + 8 * j + lane % 4 * 2;
          *reinterpret_cast<float2*>(sums + at) =
              make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
        }
      }
      __syncwarp();
      store_rows(sums, bias, activation, count, lane,
                 [&](int row) { return row_of(kSumRows * i + row); });
      __syncwarp();
    }
  }

 private:
  // 16 of the rows: a lane takes runs of eight columns.
  template <class RowOf>
  static __device__ __forceinline__ void store_rows(const float* sums, const T* biases,
                                                    Activation activation, int columns, int lane,
                                                    const RowOf& row_of) {
    constexpr int kRun = StoredRun<T>::kRun, kRuns = kColumns / kRun;
    const int column = lane % kRuns * kRun;
    const StoredRun<T> run(column, min(columns - column, kRun), biases, activation);
    if (run.count <= 0) return;
#pragma unroll 1
    for (int row = lane / kRuns; row < kSumRows; row += kWarp / kRuns) {
      T* out = row_of(row);
      if (out != nullptr) run.store(out, sums + row * kSumStride + column);
    }
  }
};

}  // namespace gossamer
