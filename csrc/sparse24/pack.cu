// Between a dense matrix [N, K] and the portable 2:4 format (sparse24.h), and the check of the
// latter's indices. All is bound by memory, so the work is cut to make accesses wide:
//
//   a thread       columns 8u .. 8u+7 of a row    |  group 2u   |  group 2u+1  |   16 bytes of a
//   holds          values  4u .. 4u+3             | kept | kept |  kept | kept |   16-bit weight
//                  index byte u                   |   nibble    |   nibble     |
//
//   a block        a rectangle of units by rows, as wide as a row is long, so that no thread has
//                  to divide; it goes on with rows further down
//
// Values are only moved, so kernels know their size and not their type.
#include "common/run.cuh"
#include "sparse24/nibbles.cuh"
#include "sparse24/pack_cuda.h"

namespace gossamer::sparse24::cuda {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times; beyond, a block takes more rows.
constexpr int64_t kMaxGridRows = 1024;

struct Shape {
  int64_t n, k, groups, index_bytes;

  explicit Shape(const Weight& w)
      : n(w.n), k(w.k), groups(w.groups()), index_bytes((groups + 1) / 2) {}
};

template <class... Parameters, class... Arguments>
void launch_over(void (*kernel)(Parameters...), int64_t rows, int64_t units, cudaStream_t stream,
                 const Arguments&... arguments) {
  int across = 1;
  while (across < units && across < kThreads) across *= 2;
  const int down = kThreads / across;
  const int64_t grid_rows = (rows + down - 1) / down;
  const dim3 grid(static_cast<unsigned>((units + across - 1) / across),
                  static_cast<unsigned>(grid_rows < kMaxGridRows ? grid_rows : kMaxGridRows));
  launch(kernel, grid, dim3(across, down), 0, stream, arguments...);
}

// Calls body(row, unit) for the units that are this thread's.
template <class Body>
__device__ __forceinline__ void for_each_unit(int64_t rows, int64_t units, const Body& body) {
  const int64_t unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  const int64_t step = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += step) {
    body(row, unit);
  }
}

// Where a kernel reports groups: how many, and the first as its distance from the end, so that
// zeros are the beginning of both and a maximum finds it.
__device__ __forceinline__ void report(unsigned long long* status, const Shape& shape, int count,
                                       int64_t position) {
  atomicAdd(&status[0], static_cast<unsigned long long>(count));
  atomicMax(&status[1], static_cast<unsigned long long>(shape.n * shape.groups - position));
}

Misfits read_status(const int64_t* status, const Shape& shape, cudaStream_t stream) {
  int64_t found[2];
  copy_to_host(found, status, sizeof(found), stream);
  return {found[0], shape.n * shape.groups - found[1], 0};
}

// ---- one group ----------------------------------------------------------------------------------

// The sign alone is no value: -0.0 is zero.
template <class T>
__device__ __forceinline__ bool is_zero(T bits) {
  return static_cast<T>(bits << 1) == 0;
}

// The index nibble for each mask of non-zeros: the lowest two of them, or what there is and the
// lowest others.
constexpr uint64_t nibble_table() {
  uint64_t table = 0;
  for (unsigned nonzero = 0; nonzero < 16; ++nonzero) {
    unsigned kept = 0;
    int count = 0;
    for (unsigned wanted = 2; wanted-- > 0;) {  // first the non-zeros, then the zeros
      for (unsigned i = 0; i < 4; ++i) {
        if ((nonzero >> i & 1u) == wanted && count < 2) kept |= 1u << i, ++count;
      }
    }
    unsigned nibble = 0;
    int slot = 0;
    for (unsigned i = 0; i < 4; ++i) {
      if (kept >> i & 1u) nibble |= i << (2 * slot++);
    }
    table |= uint64_t{nibble} << (4 * nonzero);
  }
  return table;
}
constexpr uint64_t kNibbles = nibble_table();

// One of four registers: a run-time index would move them to memory.
template <class T>
__device__ __forceinline__ T pick(const T* group, unsigned i) {
  const T low = i & 1 ? group[1] : group[0], high = i & 1 ? group[3] : group[2];
  return i & 2 ? high : low;
}

// ---- kernels ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    from_dense_kernel(const T* __restrict__ dense, const Shape s, T* __restrict__ values,
                      uint8_t* __restrict__ indices, unsigned long long* status) {
  for_each_unit(s.n, s.index_bytes, [&](int64_t row, int64_t unit) {
    const auto columns = load_run<T, 8>(dense + row * s.k + 8 * unit, s.k - 8 * unit);
    const int64_t groups_left = s.groups - 2 * unit;
    Run<T, 4> kept;
    unsigned byte = 0;
    int misfits = 0, first = 0;
#pragma unroll
    for (int g = 1; g >= 0; --g) {
      const T* group = columns.at + 4 * g;
      unsigned nonzero = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) nonzero |= is_zero(group[i]) ? 0u : 1u << i;
      if (__popc(nonzero) > 2) ++misfits, first = g;
      const auto nibble = static_cast<unsigned>(kNibbles >> (4 * nonzero)) & 15u;
      if (g < groups_left) byte |= nibble << (4 * g);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const T value = pick(group, nibble >> (2 * slot) & 3u);
        kept.at[2 * g + slot] = is_zero(value) ? T{} : value;
      }
    }
    store_run(values + row * 2 * s.groups + 4 * unit, kept, 2 * groups_left);
    indices[row * s.index_bytes + unit] = static_cast<uint8_t>(byte);
    if (misfits > 0) report(status, s, misfits, row * s.groups + 2 * unit + first);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ dense, const Shape s, const uint8_t* __restrict__ indices,
                  T* __restrict__ values) {
  for_each_unit(s.n, s.index_bytes, [&](int64_t row, int64_t unit) {
    // All eight: every sector of a row holds kept columns. Those past K are zeros.
    const auto columns = load_run<T, 8>(dense + row * s.k + 8 * unit, s.k - 8 * unit);
    const unsigned byte = indices[row * s.index_bytes + unit];
    Run<T, 4> kept;
#pragma unroll
    for (int p = 0; p < 4; ++p) kept.at[p] = pick(columns.at + p / 2 * 4, byte >> (2 * p) & 3u);
    store_run(values + row * 2 * s.groups + 4 * unit, kept, 2 * (s.groups - 2 * unit));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    to_dense_kernel(const T* __restrict__ values, const uint8_t* __restrict__ indices,
                    const Shape s, T* __restrict__ dense) {
  for_each_unit(s.n, s.index_bytes, [&](int64_t row, int64_t unit) {
    const auto kept =
        load_run<T, 4>(values + row * 2 * s.groups + 4 * unit, 2 * (s.groups - 2 * unit));
    const unsigned byte = indices[row * s.index_bytes + unit];
    Run<T, 8> columns;
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned g = i / 4, nibble = byte >> (4 * g);
      // Where both slots name one column, which only an invalid weight does, the second wins.
      const T first = (nibble & 3u) == i % 4 ? kept.at[2 * g] : T{};
      columns.at[i] = (nibble >> 2 & 3u) == i % 4 ? kept.at[2 * g + 1] : first;
    }
    store_run(dense + row * s.k + 8 * unit, columns, s.k - 8 * unit);
  });
}

// A thread checks the eight groups of four index bytes; values matter only where K ends in a group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    validate_kernel(const T* __restrict__ values, const uint8_t* __restrict__ indices,
                    const Shape s, unsigned long long* status) {
  for_each_unit(s.n, (s.index_bytes + 3) / 4, [&](int64_t row, int64_t unit) {
    const int64_t bytes_left = s.index_bytes - 4 * unit, groups_left = s.groups - 8 * unit;
    const auto bytes = load_run<uint8_t, 4>(indices + row * s.index_bytes + 4 * unit, bytes_left);
    uint32_t word;
    memcpy(&word, bytes.at, sizeof(word));
    uint32_t bad = illegal_nibbles(word);  // bit 4g + 2 for group g
    if (groups_left <= 8) {                // the row ends here
      const int last = static_cast<int>(groups_left) - 1;
      const uint32_t groups = 0xffffffffu >> (4 * (7 - last));
      bad &= groups;
      if (groups_left % 2 != 0 && (word & ~groups) != 0) bad |= 4u << (4 * (last + 1));
      const T* pair = values + row * 2 * s.groups + 2 * (s.groups - 1);
      for (int slot = 0; slot < 2; ++slot) {
        const int64_t column = 4 * (s.groups - 1) + (word >> (4 * last + 2 * slot) & 3u);
        if (column >= s.k && !is_zero(pair[slot])) bad |= 4u << (4 * last);
      }
    }
    if (bad == 0) return;
    const int64_t group = 8 * unit + (__ffs(static_cast<int>(bad)) - 1) / 4;
    // Four bits without a group are blamed on the last.
    report(status, s, __popc(bad), row * s.groups + min(group, s.groups - 1));
  });
}

// Calls body(zero) with a zero of the unsigned type of that size.
template <class Body>
void visit_size(DType dtype, const Body& body) {
  switch (size_of(dtype)) {
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: return;  // refused at the border
  }
}

unsigned long long* zeroed(int64_t* status, cudaStream_t stream) {
  fill_zero(status, 2 * sizeof(int64_t), stream);
  return reinterpret_cast<unsigned long long*>(status);
}

}  // namespace

Misfits from_dense(const void* dense, const Weight& w, void* values, uint8_t* indices,
                   int64_t* status, cudaStream_t stream) {
  const Shape shape(w);
  unsigned long long* counts = zeroed(status, stream);
  visit_size(w.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_over(from_dense_kernel<T>, w.n, shape.index_bytes, stream, static_cast<const T*>(dense),
                shape, static_cast<T*>(values), indices, counts);
  });
  return read_status(status, shape, stream);
}

void gather(const void* dense, const Weight& w, void* values, cudaStream_t stream) {
  const Shape shape(w);
  visit_size(w.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_over(gather_kernel<T>, w.n, shape.index_bytes, stream, static_cast<const T*>(dense),
                shape, w.indices, static_cast<T*>(values));
  });
}

void to_dense(const Weight& w, void* dense, cudaStream_t stream) {
  const Shape shape(w);
  visit_size(w.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_over(to_dense_kernel<T>, w.n, shape.index_bytes, stream, static_cast<const T*>(w.values),
                w.indices, shape, static_cast<T*>(dense));
  });
}

Misfits validate(const Weight& w, int64_t* status, cudaStream_t stream) {
  const Shape shape(w);
  unsigned long long* counts = zeroed(status, stream);
  visit_size(w.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_over(validate_kernel<T>, w.n, (shape.index_bytes + 3) / 4, stream,
                static_cast<const T*>(w.values), w.indices, shape, counts);
  });
  Misfits found = read_status(status, shape, stream);
  if (found.count > 0) {
    const int64_t row = found.first / shape.groups, group = found.first % shape.groups;
    uint8_t byte;
    copy_to_host(&byte, w.indices + row * shape.index_bytes + group / 2, 1, stream);
    found.byte = byte;
  }
  return found;
}

}  // namespace gossamer::sparse24::cuda
