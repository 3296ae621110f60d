// Between the dense weight [C_out, taps, C_in / groups] and its blocks (blocksparse.h), one thread
// an element. Values are only moved, so kernels know their size and not their type. Indices are
// kept within the weight, whatever they say.
#include "blocksparse/pack_cuda.h"
#include "common/launch.cuh"

namespace gossamer::blocksparse::cuda {
namespace {

constexpr int kThreads = 256;
// Enough to fill any GPU several times; beyond, a thread takes more elements.
constexpr int64_t kMaxGrid = 1 << 14;

struct Shape {
  const int32_t *crow, *col;
  int group_out, taps, group_in, rows, cols;
  int row_blocks, col_blocks, block_rows, block_columns;

  explicit Shape(const Weight& w)
      : crow(w.crow_indices),
        col(w.col_indices),
        group_out(static_cast<int>(w.group_out)),
        taps(static_cast<int>(w.taps)),
        group_in(static_cast<int>(w.group_in)),
        rows(static_cast<int>(w.rows)),
        cols(static_cast<int>(w.cols)),
        row_blocks(static_cast<int>(w.row_blocks())),
        col_blocks(static_cast<int>(w.col_blocks())),
        block_rows(static_cast<int>(w.block_rows())),
        block_columns(static_cast<int>(w.block_columns())) {}
};

// Calls body(i) for the elements that are this thread's. `Index` is as wide as `count` needs:
// divisions of 64 bits would take longer than the memory.
template <class Index, class Body>
__device__ __forceinline__ void for_each_element(Index count, const Body& body) {
  const Index step = Index{gridDim.x} * blockDim.x;
  for (Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) body(i);
}

// The block row of a block: the last that begins at it or before.
__device__ __forceinline__ int block_row_of(const Shape& s, int block) {
  int low = 0, high = s.block_rows - 1;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    s.crow[middle] <= block ? low = middle : high = middle - 1;
  }
  return low;
}

// Where an entry of a block lies in the dense weight; -1 in the padding.
template <class Index>
__device__ __forceinline__ int64_t place_of(const Shape& s, Index entry) {
  const auto of_block = static_cast<Index>(s.rows * s.cols);
  const Index block = entry / of_block;
  const auto within = static_cast<int>(entry - block * of_block);
  const int block_row = block_row_of(s, static_cast<int>(block));
  const auto column = static_cast<int>(
      min(static_cast<unsigned>(s.col[block]), static_cast<unsigned>(s.block_columns - 1)));
  const int group = block_row / s.row_blocks, tap = column / s.col_blocks;
  const int64_t row = int64_t{block_row - group * s.row_blocks} * s.rows + within / s.cols;
  const int channel = (column - tap * s.col_blocks) * s.cols + within % s.cols;
  if (row >= s.group_out || channel >= s.group_in) return -1;
  return ((int64_t{group} * s.group_out + row) * s.taps + tap) * s.group_in + channel;
}

// ---- kernels ------------------------------------------------------------------------------------

// `live` holds zeros; whoever finds a number that is not 0 writes the same 1.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    find_live_kernel(const T* __restrict__ dense, const Shape s, Index count, uint8_t* live) {
  for_each_element(count, [&](Index i) {
    if (static_cast<T>(dense[i] << 1) == 0) return;  // the sign alone is no value
    const Index of_tap = i / static_cast<Index>(s.group_in);
    const auto channel = static_cast<int>(i - of_tap * static_cast<Index>(s.group_in));
    const auto out = static_cast<int>(of_tap / static_cast<Index>(s.taps));
    const auto tap = static_cast<int>(of_tap - out * static_cast<Index>(s.taps));
    const int group = out / s.group_out, row = (out - group * s.group_out) / s.rows;
    const int64_t block_row = int64_t{group} * s.row_blocks + row;
    live[block_row * s.block_columns + tap * s.col_blocks + channel / s.cols] = 1;
  });
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ dense, const Shape s, Index count, T* __restrict__ values) {
  for_each_element(count, [&](Index i) {
    const int64_t place = place_of(s, i);
    values[i] = place < 0 ? T{} : dense[place];
  });
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    to_dense_kernel(const T* __restrict__ values, const Shape s, Index count,
                    T* __restrict__ dense) {
  for_each_element(count, [&](Index i) {
    const int64_t place = place_of(s, i);
    if (place >= 0) dense[place] = values[i];
  });
}

// ---- launching ----------------------------------------------------------------------------------

// Calls body(zero of the unsigned type of the dtype's size, count in a type that holds it).
template <class Body>
void visit(DType dtype, int64_t count, const Body& body) {
  const auto with_index = [&](auto zero) {
    count <= int64_t{1} << 31 ? body(zero, static_cast<uint32_t>(count))
                              : body(zero, static_cast<uint64_t>(count));
  };
  switch (size_of(dtype)) {
    case 2: return with_index(uint16_t{});
    case 4: return with_index(uint32_t{});
    case 8: return with_index(uint64_t{});
    default: return;  // refused at the border
  }
}

unsigned grid_for(int64_t count) {
  const int64_t blocks = ceil_div(count, kThreads);
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

int64_t dense_size(const Weight& w) { return w.groups * w.group_out * w.taps * w.group_in; }

}  // namespace

void find_live(const void* dense, const Weight& w, uint8_t* live, cudaStream_t stream) {
  fill_zero(live, static_cast<size_t>(w.block_rows() * w.block_columns()), stream);
  const int64_t size = dense_size(w);
  visit(w.dtype, size, [&](auto zero, auto count) {
    using T = decltype(zero);
    launch(find_live_kernel<T, decltype(count)>, grid_for(size), kThreads, 0, stream,
           static_cast<const T*>(dense), Shape(w), count, live);
  });
}

void gather(const void* dense, const Weight& w, void* values, cudaStream_t stream) {
  const int64_t size = w.nnz * w.rows * w.cols;
  if (size == 0) return;
  visit(w.dtype, size, [&](auto zero, auto count) {
    using T = decltype(zero);
    launch(gather_kernel<T, decltype(count)>, grid_for(size), kThreads, 0, stream,
           static_cast<const T*>(dense), Shape(w), count, static_cast<T*>(values));
  });
}

void to_dense(const Weight& w, void* dense, cudaStream_t stream) {
  fill_zero(dense, static_cast<size_t>(dense_size(w) * size_of(w.dtype)), stream);
  const int64_t size = w.nnz * w.rows * w.cols;
  if (size == 0) return;
  visit(w.dtype, size, [&](auto zero, auto count) {
    using T = decltype(zero);
    launch(to_dense_kernel<T, decltype(count)>, grid_for(size), kThreads, 0, stream,
           static_cast<const T*>(w.values), Shape(w), count, static_cast<T*>(dense));
  });
}

}  // namespace gossamer::blocksparse::cuda
