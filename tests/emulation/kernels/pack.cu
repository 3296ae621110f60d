// The conversions between dense and portable weights, for Python. Groups that do not fit, or bad
// indices, come back as the error "count first byte".
#include "kernels/exports.h"
#include "sparse24/pack.cu"

namespace {

using namespace gossamer;
using sparse24::Misfits;
using sparse24::Weight;

Weight weight_of(const void* values, const uint8_t* indices, int64_t n, int64_t k, int64_t dtype) {
  return {static_cast<DType>(dtype), n, k, values, indices, nullptr};
}

void raise_if_any(const Misfits& found) {
  if (found.count == 0) return;
  throw std::runtime_error(std::to_string(found.count) + " " + std::to_string(found.first) + " " +
                           std::to_string(found.byte));
}

}  // namespace

GOSSAMER_EXPORT int from_dense(const void* dense, void* values, uint8_t* indices, int64_t* status,
                               int64_t n, int64_t k, int64_t dtype, char* text,
                               int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    const Weight shape = weight_of(nullptr, nullptr, n, k, dtype);
    raise_if_any(sparse24::cuda::from_dense(dense, shape, values, indices, status, nullptr));
  });
}

GOSSAMER_EXPORT int gather(const void* dense, const uint8_t* indices, void* values, int64_t n,
                           int64_t k, int64_t dtype, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    sparse24::cuda::gather(dense, weight_of(nullptr, indices, n, k, dtype), values, nullptr);
  });
}

GOSSAMER_EXPORT int to_dense(const void* values, const uint8_t* indices, void* dense, int64_t n,
                             int64_t k, int64_t dtype, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    sparse24::cuda::to_dense(weight_of(values, indices, n, k, dtype), dense, nullptr);
  });
}

GOSSAMER_EXPORT int validate(const void* values, const uint8_t* indices, int64_t* status, int64_t n,
                             int64_t k, int64_t dtype, char* text, int64_t text_bytes) {
  return report(text, text_bytes, [&] {
    raise_if_any(
        sparse24::cuda::validate(weight_of(values, indices, n, k, dtype), status, nullptr));
  });
}
