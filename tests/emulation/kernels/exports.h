#pragma once
// The functions of a kernel library that Python calls. Each takes pointers and 64-bit integers,
// then a buffer that receives the text of an exception, and returns whether there was one.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "common/launch.cuh"

#define GOSSAMER_EXPORT extern "C" __attribute__((visibility("default")))

namespace gossamer {

template <class F>
int report(char* text, int64_t text_bytes, const F& call) {
  try {
    call();
#if defined(__CUDACC__)  // the same file, built for a GPU: what its kernels did wrong shows here
    GOSSAMER_CUDA_CHECK(cudaDeviceSynchronize());
#endif
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(text, static_cast<size_t>(text_bytes), "%s", error.what());
    return 1;
  }
}

}  // namespace gossamer
