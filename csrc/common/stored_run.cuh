#pragma once
// The end of a sum where the channels of an output lie side by side: a lane stores eight of them.
#include "common/activation.cuh"
#include "common/ptx.cuh"

namespace gossamer {

template <class T>
struct StoredRun {
  static constexpr int kRun = 8;

  int64_t first;  // output channel
  int count;      // that there are, of kRun; none if not positive
  float bias[kRun];
  Activation activation;

  __device__ StoredRun(int64_t first_, int count_, const void* biases, Activation activation_)
      : first(first_), count(count_), activation(activation_) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const bool there = biases != nullptr && i < count;
      bias[i] = there ? ptx::to_float(static_cast<const T*>(biases)[first + i]) : 0.0f;
    }
  }

  // `row` is the output's channel 0, `residual` that of what is added before the activation, or
  // null.
  __device__ void store(T* row, const float* sums, const T* residual = nullptr) const {
    float y[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) y[i] = sums[i] + bias[i];
    if (residual != nullptr) add(y, residual + first);
    if (activation != Activation::kNone) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[i] = activate(y[i], activation);
    }
    T* out = row + first;
    if (count == kRun && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
      ptx::store16(out, {ptx::pack<T>(y[0], y[1]), ptx::pack<T>(y[2], y[3]),
                         ptx::pack<T>(y[4], y[5]), ptx::pack<T>(y[6], y[7])});
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count) out[i] = ptx::from_float<T>(y[i]);
      }
    }
  }

 private:
  __device__ void add(float (&y)[kRun], const T* from) const {
    if (count == kRun && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const uint4 piece = ptx::load16(from);
      const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        const float2 two = ptx::unpack<T>(words[i / 2]);
        y[i] += two.x, y[i + 1] += two.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count) y[i] += ptx::to_float(from[i]);
      }
    }
  }
};

}  // namespace gossamer
