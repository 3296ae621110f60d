// The conversions between portable weights and the layouts of the kernels, for Python.
#include "kernels/exports.h"
#include "sparse24/pack_panels.cu"

GOSSAMER_EXPORT int to_panels(const void* values, const uint8_t* indices, uint32_t* panels,
                              int64_t n, int64_t k, int64_t dtype, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    const sparse24::Weight w{static_cast<DType>(dtype), n, k, values, indices, nullptr};
    sparse24::cuda::to_panels(w, panels, nullptr);
  });
}

GOSSAMER_EXPORT int from_panels(const uint32_t* panels, void* values, uint8_t* indices, int64_t n,
                                int64_t k, int64_t dtype, char* text, int64_t text_bytes) {
  using namespace gossamer;
  return report(text, text_bytes, [&] {
    const sparse24::Weight w{static_cast<DType>(dtype), n, k, nullptr, nullptr, panels};
    sparse24::cuda::from_panels(w, values, indices, nullptr);
  });
}
