#pragma once
// A few consecutive elements of a row, between global memory and registers. Rows of any N and K
// begin at any element, so the wide access is taken where the address allows it.
#include "common/launch.cuh"

namespace gossamer {

// Aligned, so that it moves by as few accesses as its size takes, each of at most 16 bytes.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) Run {
  T at[Count];
};

template <class R>
__device__ __forceinline__ bool is_aligned_for(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(R) == 0;
}

// The first `valid` elements, and zeros after them. `valid` may be negative or beyond Count.
template <class T, int Count>
__device__ __forceinline__ Run<T, Count> load_run(const T* from, int64_t valid) {
  if (valid >= Count && is_aligned_for<Run<T, Count>>(from)) {
    return *reinterpret_cast<const Run<T, Count>*>(from);
  }
  Run<T, Count> run;
#pragma unroll
  for (int i = 0; i < Count; ++i) run.at[i] = i < valid ? from[i] : T{};
  return run;
}

// Writes the first `valid` elements.
template <class T, int Count>
__device__ __forceinline__ void store_run(T* to, const Run<T, Count>& run, int64_t valid) {
  if (valid >= Count && is_aligned_for<Run<T, Count>>(to)) {
    *reinterpret_cast<Run<T, Count>*>(to) = run;
    return;
  }
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if (i < valid) to[i] = run.at[i];
  }
}

}  // namespace gossamer
