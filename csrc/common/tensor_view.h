#pragma once
// What a kernel may know of a tensor: where it lies and how it is laid out.
#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace gossamer {

constexpr int kMaxDims = 8;

enum class Device : uint8_t { kCPU, kCUDA };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = Device::kCPU;
  int device_index = 0;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  void* stream = nullptr;          // of a CUDA tensor's device, the current one (a cudaStream_t)

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool is_contiguous() const {
    if (numel() == 0) return true;  // as torch has it, whatever the strides
    int64_t expected = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline std::string shape_text(const TensorView& t) {
  std::string text = "[";
  for (int d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  return text + "]";
}

}  // namespace gossamer
